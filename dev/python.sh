# Finds a Python that the packages in requirements/ can be installed with: PYTHON, if it is set, else the first that fits
# of those on the PATH and of pyenv's, which are often not on it.
fits() { "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        fits "$python"
        return
    fi
    for python in python3 python3.14 python3.13 python3.12; do
        ! fits "$python" || return 0
    done
    if command -v pyenv >/dev/null 2>&1; then
        for python in "$(pyenv root)"/versions/3.*/bin/python3; do
            ! fits "$python" || return 0
        done
    fi
    python=
    return 1
}
