"""What a relay runs on a node: POSIX sh, coreutils, and what sshd and Docker bring along. Never who gives to whom."""

HELD = 75  # another command is at work in the folder

# $1 folder, $2 name of the archive, $3 its bytes, $4 the node's address for the others; none: it is fed by us.
# Standard input is lines: `allow KEY ADDRESS`, `from NUMBER ADDRESS PORT USER KEY`, `stop NUMBER`, `tick`, `done`; its
# end is the end of it all. It says `ready`, `at BYTES`, `whole`, `broken NUMBER BYTES`.
RELAY = r"""
set -u; umask 077; LC_ALL=C; export LC_ALL; unset SSH_AUTH_SOCK SSH_ASKPASS
folder=$1 file=$1/$2.part total=$3 own=$4 main=$$ keys= done=
say() { printf 'launcher: %s\n' "$*"; }
size() { stat -c %s -- "$file" 2>/dev/null || echo 0; }
end() {
  trap '' HUP INT TERM PIPE
  [ -z "$keys" ] || rm -rf -- "$keys"
  [ -z "$done" ] || rm -f -- "$file"
  rm -f -- "$folder/lock"
  kill 0
}
mkdir -p -- "$folder" || exit 74
began() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }
if ! (set -C; echo "$main $(began "$main")" > "$folder/lock") 2>/dev/null; then
  read -r other since < "$folder/lock" || :
  [ -z "${other:-}" ] || [ "$(began "$other")" != "$since" ] || exit 75
  echo "$main $(began "$main")" > "$folder/lock" || exit 74
fi
trap end EXIT
trap 'exit 129' HUP INT TERM PIPE
find "$folder" -name '*.part' ! -name "$2.part" -exec rm -f {} +
: >> "$file" || exit 74
[ "$(size)" -le "$total" ] || : > "$file"
for place in "${XDG_RUNTIME_DIR:-}" /dev/shm "${TMPDIR:-/tmp}"; do
  [ -n "$place" ] && [ -w "$place" ] && keys=$(mktemp -d "$place/launcher-XXXXXXXXXX") && break
done
[ -n "$keys" ] || exit 74
: > "$keys/allowed"
port= host= client=
if [ -n "$own" ]; then
  sshd=$(PATH=$PATH:/usr/sbin:/usr/local/sbin command -v sshd)
  if ssh-keygen -q -t ed25519 -N '' -C '' -f "$keys/host" && ssh-keygen -q -t ed25519 -N '' -C '' -f "$keys/client"
  then
    client=$(cut -d' ' -f2 < "$keys/client.pub")
    cat > "$keys/serve" <<'EOS'
# $1 the relay, $2 the file, $3 its bytes; from which byte on is what the other node asks.
at=${SSH_ORIGINAL_COMMAND:-}
case $at in ''|0?*|*[!0-9]*) exit 64 ;; esac
while [ "$at" -lt "$3" ] && kill -0 "$1"; do
  now=$(stat -c %s -- "$2") || exit
  if [ "$now" -gt "$at" ]; then
    dd if="$2" bs=1M iflag=skip_bytes,count_bytes skip="$at" count="$((now - at))" status=none || exit
    at=$now
  else
    sleep 0.05 || sleep 1
  fi
done
EOS
    # HOME: the account's start-up files must not say anything among the bytes.
    quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"; }
    cat > "$keys/config" <<EOS
ListenAddress $own
HostKey $keys/host
AuthorizedKeysFile $keys/allowed
AuthenticationMethods publickey
ForceCommand exec sh $(quoted "$keys/serve") $main $(quoted "$file") $total 2>/dev/null
AllowUsers $(id -un)
SetEnv HOME=$keys
PermitRootLogin yes
StrictModes no
UsePAM no
DisableForwarding yes
PermitTTY no
PermitUserRC no
PermitUserEnvironment no
PrintMotd no
MaxAuthTries 2
MaxSessions 1
LoginGraceTime 15
ClientAliveInterval 5
PidFile none
LogLevel INFO
EOS
    for attempt in 1 2 3 4 5; do
      port=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 12000))
      "$sshd" -D -e -f "$keys/config" -o "Port=$port" </dev/null >/dev/null 2>"$keys/log" &
      pid=$!
      while kill -0 "$pid" 2>/dev/null; do
        grep -q '^Server listening' "$keys/log" && break 2
        sleep 0.02
      done
      port=
    done
    [ -z "$port" ] || host=$(cut -d' ' -f2 < "$keys/host.pub")
  fi
fi
write() { dd bs=256k iflag=fullblock,count_bytes count="$1" status=none >> "$file"; }
fetch() {
  echo "peer ssh-ed25519 $5" > "$keys/known"
  rm -f "$keys/pipe"; mkfifo "$keys/pipe" || exit 74
  ssh -F /dev/null -T -x -a -i "$keys/client" -b "$own" -p "$3" -l "$4" \
    -o HostKeyAlias=peer -o "UserKnownHostsFile=$keys/known" -o GlobalKnownHostsFile=/dev/null \
    -o StrictHostKeyChecking=yes -o UpdateHostKeys=no -o CheckHostIP=no -o IdentitiesOnly=yes -o BatchMode=yes \
    -o PreferredAuthentications=publickey -o ConnectTimeout=5 -o ServerAliveInterval=2 -o ServerAliveCountMax=3 \
    -o Compression=no -o ControlMaster=no -o LogLevel=ERROR \
    -o KexAlgorithms=curve25519-sha256,ecdh-sha2-nistp256 -c aes128-gcm@openssh.com,chacha20-poly1305@openssh.com \
    -- "$2" "$(size)" </dev/null >"$keys/pipe" 2>"$keys/said" &
  line=$!
  # What has come is written down before anybody goes on from there.
  trap 'kill "$line" 2>/dev/null; wait; say broken "$1" "$(size)"; exit' TERM
  write "$((total - $(size)))" < "$keys/pipe" 2>>"$keys/said" & wait $!
  trap '' TERM
  kill "$line" 2>/dev/null
  if [ "$(size)" -eq "$total" ]; then say whole; else say broken "$1" "$(size)" "$(tail -n 1 "$keys/said")"; fi
}
say ready "$(size)" "$(df -Pk -- "$folder" | awk 'NR == 2 { print $4 }')" "$(id -un)" \
  "${port:--}" "${host:--}" "${client:--}"
(
  trap - EXIT; last=; silent=0
  while sleep 0.5; do
    now=$(size); [ "$now" = "$last" ] || say at "$now"; last=$now
    if [ -e "$keys/tick" ]; then rm -f "$keys/tick"; silent=0; else silent=$((silent + 1)); fi
    [ "$silent" -lt 120 ] || kill "$main"
    kill -0 "$main" 2>/dev/null || { end; exit; }  # it was killed, and could not put anything away
  done
) &
fetching=
while read -r verb a b c d e; do
  case $verb in
    allow) echo "restrict,from=\"$b\" ssh-ed25519 $a" >> "$keys/allowed" ;;
    from) (trap - EXIT; fetch "$a" "$b" "$c" "$d" "$e") & fetching=$! ;;
    stop) kill "$fetching" 2>/dev/null ;;
    tick) : > "$keys/tick" ;;
    done) done=yes ;;
  esac
done
"""

# $1 file, $2 how many bytes it has, $3 how many it shall have.
FEED = r"""
umask 077
[ "$(stat -c %s -- "$1")" = "$2" ] || { echo "the file changed meanwhile" >&2; exit 1; }
dd bs=256k iflag=fullblock,count_bytes count="$(($3 - $2))" status=none >> "$1" && [ "$(stat -c %s -- "$1")" = "$3" ]
"""

# $1 file, $2 its SHA-256: an engine would take in whatever else a neighbour had put into the file. What is refused is
# not gone on from.
LOAD = r"""
refuse() { rm -f -- "$1"; printf '%s\n' "$2" >&2; exit 1; }
[ "$(sha256sum < "$1" | cut -d' ' -f1)" = "$2" ] || refuse "$1" "what has come is not what was sent"
said=$(docker load -q -i "$1" 2>&1) || refuse "$1" "$said"
"""

# $1 folder, $2 name, $3 the image. What is saved is whole before it has the name.
SAVE = r"""
umask 077; mkdir -p -- "$1" && find "$1" -name '*.part' ! -name "$2.part" -exec rm -f {} + || exit
cd -- "$1" && { [ -s "$2.part" ] || { docker save -o "$2.new" "$3" && mv -f "$2.new" "$2.part"; } } || exit
stat -c %s "$2.part" && sha256sum < "$2.part"
"""
