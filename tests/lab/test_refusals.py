"""What must not start: each one clear message, the right exit code, nothing changed on any node."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import User, containers
from tests.testbed import lab as testbed


@pytest.fixture
def unchanged(lab: testbed.Lab, user: User) -> object:
    """The containers of every node before; the test compares at its end."""
    return [containers(machine.name) for machine in lab.machines]


def nodes_of(user: User) -> list[dict[str, object]]:
    return list(yaml.safe_load(user.inventory.read_text())["nodes"])


def test_a_changed_host_key_is_refused_with_both_fingerprints(lab: testbed.Lab, user: User, unchanged: object) -> None:
    bad = lab.machines[1]
    with testbed.impostor(bad.name):
        said = user.launcher("run", "jobs/report.py")
    assert said.code == 3
    assert said.first.startswith(f"error: node {bad.name}")
    assert "not the pinned one" in said.first
    assert said.err.count("SHA256:") >= 2
    assert [containers(machine.name) for machine in lab.machines] == unchanged


def test_a_misspelt_key_is_refused_with_its_place_and_the_right_one(user: User) -> None:
    path = user.home / "misspelt.yaml"
    path.write_text(user.inventory.read_text().replace("accelerator:", "acelerator:"))
    said = user.launcher("up", str(path))
    assert said.code == 2
    assert ":2:1" in said.first
    assert "'accelerator'" in said.err


def test_a_missing_node_is_named_and_all_others_are_asked(lab: testbed.Lab, user: User, unchanged: object) -> None:
    with testbed.disconnect(lab.machines[2].name):
        began = time.monotonic()
        said = user.launcher("run", "jobs/report.py")
        seconds = time.monotonic() - began
    assert said.code == 3
    assert lab.machines[2].name in said.first
    assert seconds < 60
    assert [containers(machine.name) for machine in lab.machines] == unchanged


def test_a_busy_port_is_refused_with_who_holds_it(lab: testbed.Lab, user: User, unchanged: object) -> None:
    master = lab.machines[0].name
    testbed.run(master, "sh", "-c", "setsid /usr/sbin/sshd -D -e -p 29611 -o PidFile=/run/busy.pid >/dev/null 2>&1 &")
    try:
        said = user.launcher("run", "--port", "29611", "jobs/report.py")
        assert (said.code, "[port-busy]" in said.first, "29611" in said.first) == (4, True, True), said.err
        assert [containers(machine.name) for machine in lab.machines] == unchanged
    finally:
        testbed.run(master, "sh", "-c", "kill $(cat /run/busy.pid)")


def test_a_missing_nvme_path_is_refused_and_not_created(lab: testbed.Lab, user: User, unchanged: object) -> None:
    path = user.write(name=lab.prefix, defaults={**_defaults(user), "nvme": ["/mnt/nowhere"]})
    said = user.launcher("up", str(path))
    assert (said.code, "/mnt/nowhere does not exist [path-missing]" in said.first) == (4, True), said.err
    for machine in lab.machines:
        assert testbed.run(machine.name, "sh", "-c", "[ -e /mnt/nowhere ] || echo none") == "none\n"
    assert [containers(machine.name) for machine in lab.machines] == unchanged


def test_an_nvme_path_on_the_root_disk_is_a_finding(lab: testbed.Lab, user: User) -> None:
    for machine in lab.machines:
        testbed.run(machine.name, "install", "-d", "-o", "ml", "/opt/scratch")
    path = user.write(name=lab.prefix, defaults={**_defaults(user), "nvme": ["/opt/scratch"]})
    said = user.launcher("up", "--dry-run", str(path))
    assert (said.code, "[nvme-on-root]" in said.first) == (4, True), said.err
    assert user.launcher("up", "--dry-run", "--ignore", "nvme-on-root", str(path)).code == 0


def test_a_full_disk_is_refused(lab: testbed.Lab, user: User, unchanged: object) -> None:
    node = lab.machines[1].name
    testbed.run(node, "sh", "-c", "head -c 60000000 /dev/zero > /mnt/small/fill && chmod 777 /mnt/small")
    try:
        path = user.write(name=lab.prefix, defaults={**_defaults(user), "nvme": ["/mnt/small"]})
        said = user.launcher("up", str(path))
        assert (said.code, "[disk-full]" in said.first, "/mnt/small" in said.first) == (4, True, True), said.err
        assert [containers(machine.name) for machine in lab.machines] == unchanged
    finally:
        testbed.run(node, "rm", "/mnt/small/fill")


def test_s16_a_docker_port_that_is_open_to_all_is_refused(lab: testbed.Lab, user: User, unchanged: object) -> None:
    node = lab.machines[1].name
    testbed.run(node, "sh", "-c", "setsid /usr/sbin/sshd -D -e -p 2375 -o PidFile=/run/open.pid >/dev/null 2>&1 &")
    try:
        said = user.launcher("run", "jobs/report.py")
        assert (said.code, node in said.first, "[docker-tcp]" in said.first) == (4, True, True), said.err
        assert [containers(machine.name) for machine in lab.machines] == unchanged
    finally:
        testbed.run(node, "sh", "-c", "kill $(cat /run/open.pid)")


def test_s19_a_path_that_leads_into_the_system_is_refused(lab: testbed.Lab, user: User, unchanged: object) -> None:
    node = lab.machines[2].name
    testbed.run(node, "ln", "-sfn", "/var/lib/docker", "/mnt/planted")
    try:
        path = user.write(name=lab.prefix, defaults={**_defaults(user), "paths": {"checkpoints": "/mnt/planted"}})
        for machine in lab.machines[:2]:
            testbed.run(machine.name, "install", "-d", "-o", "ml", "/mnt/planted")
        said = user.launcher("up", str(path))
        assert (said.code, node in said.err, "[path-leads-out]" in said.err) == (4, True, True), said.err
        assert "/mnt/planted leads elsewhere, and that must not be '/var/lib/docker'" in said.err
        assert [containers(machine.name) for machine in lab.machines] == unchanged
    finally:
        for machine in lab.machines:
            testbed.run(machine.name, "rm", "-rf", "/mnt/planted")


def test_a_user_without_docker_permission_is_told_the_cure(lab: testbed.Lab, user: User) -> None:
    path = user.write(name=lab.prefix, defaults={**_defaults(user), "user": "nodocker"})
    said = user.launcher("up", "--dry-run", str(path))
    assert (said.code, "may not use Docker" in said.first, "usermod -aG docker" in said.err) == (4, True, True), (
        said.err
    )


def test_a_node_whose_engine_is_down_is_named(lab: testbed.Lab, user: User) -> None:
    node = lab.machines[2].name
    with testbed.stop_engine(node):
        said = user.launcher("run", "jobs/report.py")
    assert (said.code, node in said.first, "[docker]" in said.first) == (4, True, True), said.err


def test_a_script_that_is_not_there_is_refused_before_anything_is_asked(user: User) -> None:
    said = user.launcher("run", "examples/trian.py")
    assert (said.code, "did you mean examples/train.py" in said.err) == (2, True)


def _defaults(user: User) -> dict[str, object]:
    return dict(yaml.safe_load(Path(user.inventory).read_text())["defaults"])
