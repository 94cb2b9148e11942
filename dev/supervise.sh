# What the servers in dev share: one throw-away server in one throw-away folder, which live as long as stdin.
# shellcheck shell=bash disable=SC2034
#
# stdout, once the server answers: key=value lines, then `ready`. Then each line of stdin is a command, answered by one
# line, `ok ...` or `error ...`:
#
#   stop fast [SECONDS]   an orderly stop; an error when it takes longer than SECONDS (60)
#   stop immediate        a stop without clean-up, as after a power cut
#   stop kill             SIGKILL of the whole server
#   start                 start again: same port, same data
#   pause, resume         SIGSTOP and SIGCONT of the whole server
#   status                ok running | paused | stopped
#
# At the end of stdin, or at SIGINT, SIGTERM or SIGHUP, the server is stopped and the folder removed.
#
# A script that sources this defines:
#   prepare           make the data folder in $folder
#   choose_ports      set the ports and write the configuration
#   launch            start the server, with no hold on our stdin and stdout; true when it answers
#   server_pid        print the pid of the server's main process
#   halt fast SECONDS an orderly stop
#   halt immediate    a stop without clean-up
#   announce          print the key=value lines

set -u
folder=
port=
dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

note() { echo "${0##*/}: $*" >&2; }

# A Unix socket's path may have 103 bytes on macOS, and its default TMPDIR leaves room for it.
make_folder() {
    local parent=${TMPDIR:-/tmp}
    [ ${#parent} -le 60 ] && [ -w "$parent" ] || parent=/tmp
    folder=$(mktemp -d "${parent%/}/postbox.XXXXXX") || exit 1
    log=$folder/log
    chmod 755 "$folder"
    cd "$folder" || exit 1
}

# Postgres and PgBouncer refuse to run as root.
user=
if [ "$(id -u)" = 0 ]; then
    user=nobody
    ! id postgres >/dev/null 2>&1 || user=postgres
fi

as_user() {
    if [ -z "$user" ]; then
        "$@"
    elif command -v setpriv >/dev/null; then
        setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups -- "$@"
    else
        # shellcheck disable=SC2016
        su -s /bin/sh "$user" -c 'exec "$0" "$@"' -- "$@"
    fi
}

# A port below the range that Linux and macOS give to outgoing connections. Somebody else may take it before the server
# does: then the server fails to bind, and `first_start` takes another.
free_port() {
    local port
    while :; do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

# A dead process that nobody has reaped, as in a container without an init, still has a pid.
alive() {
    case $(ps -o stat= -p "$1" 2>/dev/null) in '' | Z*) return 1 ;; esac
}

state() {
    local pid
    pid=$(server_pid)
    if [ -z "$pid" ] || ! alive "$pid"; then
        echo stopped
    else
        case $(ps -o stat= -p "$pid") in T*) echo paused ;; *) echo running ;; esac
    fi
}

# The main process and its children. It is halted before its children are listed, so that none is born meanwhile.
signal_all() {
    local signal=$1 pid children
    pid=$(server_pid)
    [ -n "$pid" ] && alive "$pid" || return 0
    [ "$signal" = CONT ] || kill -STOP "$pid"
    children=$(ps -A -o pid= -o ppid= | awk -v parent="$pid" '$2 == parent { print $1 }')
    # shellcheck disable=SC2086
    kill -"$signal" $children "$pid" 2>/dev/null
}

wait_until_stopped() {
    local tenths=$(($1 * 10))
    while [ "$(state)" != stopped ]; do
        [ $((tenths -= 1)) -ge 0 ] || return 1
        sleep 0.1
    done
}

first_start() {
    local attempt
    for attempt in 1 2 3 4 5; do
        choose_ports
        launch && return
        # The log shows "Address already in use" when another server was faster.
        grep -q 'already in use' "$log" || break
        note "port taken, attempt $attempt"
        signal_all KILL
    done
    note "the server did not start:"
    tail -n 30 "$log" >&2
    exit 1
}

stop() {
    case $1-$(state) in
    *-stopped) echo "error the server is not running" ;;
    fast-*)
        signal_all CONT
        if halt fast "$2"; then echo ok; else echo "error still running after $2 seconds"; fi
        ;;
    immediate-*)
        signal_all CONT
        if halt immediate; then echo ok; else echo "error still running"; fi
        ;;
    kill-*)
        signal_all KILL
        if wait_until_stopped 10; then echo ok; else echo "error still running"; fi
        ;;
    *) echo "error unknown way to stop '$1': expected fast, immediate or kill" ;;
    esac
}

start() {
    if [ "$(state)" != stopped ]; then
        echo "error the server is running"
    elif launch; then
        echo "ok pid=$(server_pid)"
    else
        echo "error the server did not start: $(tail -n 1 "$log")"
    fi
}

pause() {
    if [ "$(state)" = running ]; then signal_all STOP && echo ok; else echo "error the server is not running"; fi
}

resume() {
    if [ "$(state)" = paused ]; then signal_all CONT && echo ok; else echo "error the server is not paused"; fi
}

serve() {
    local command argument limit
    exec 3<&0 </dev/null
    trap 'exit 1' TERM
    prepare
    first_start
    trap - TERM
    { announce && echo ready; } 2>/dev/null
    while read -r command argument limit <&3; do
        case $command in
        stop) stop "${argument:-fast}" "${limit:-60}" ;;
        start | pause | resume) "$command" ;;
        status) echo "ok $(state)" ;;
        *) echo "error unknown command '$command'" ;;
        esac
    done
    clean_up
}

clean_up() {
    trap '' INT TERM HUP
    if [ -n "${server:-}" ]; then
        kill "$server" 2>/dev/null
        wait "$server" 2>/dev/null
    fi
    [ -d "$folder" ] || return
    discard
    cd /
    rm -rf "$folder"
}

# The work is done in a process of its own for two reasons: a trap runs at once during `wait`, but in old bash only
# after `read`; and if we are killed by SIGKILL, that process still sees the end of stdin and cleans up.
supervise() {
    [ ! -t 0 ] || note "starting; Ctrl-C or Ctrl-D stops it and removes all it made"
    trap '' PIPE
    trap clean_up EXIT
    trap 'exit 0' INT TERM HUP
    make_folder
    exec 3<&0
    serve <&3 3<&- &
    server=$!
    exec 3<&- </dev/null
    wait "$server"
}
