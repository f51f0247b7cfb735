"""A machine over SSH, by Fabric and paramiko: the only package that names them. Never a judgment on what it answers.

transport   the Transport contract: which connection carries which command
session     one connection, and one command on it
dial        a command as a socket, for the Docker Engine
scan        the keys that a machine shows
connect     hop by hop, with pinned keys (keys: by which of the user's keys)
route       the hops, as the inventory and ~/.ssh/config say
faults      what an error of the connection means to a user
"""

from cluster.ssh.route import LIMITS, Limits, hops
from cluster.ssh.scan import scan_host_keys
from cluster.ssh.transport import SshTransport

__all__ = ["LIMITS", "Limits", "SshTransport", "hops", "scan_host_keys"]
