# Puts a chosen Java first in the PATH. Homebrew keeps its own out of the PATH, behind a stub that only prints an error.
# shellcheck shell=bash
for home in "${JAVA_HOME:-}" /opt/homebrew/opt/openjdk /usr/local/opt/openjdk; do
    if [ -n "$home" ] && [ -x "$home/bin/java" ]; then
        PATH=$home/bin:$PATH
        break
    fi
done
