#!/bin/sh
# Installs what lies beside this script, offline: sh install.sh [FOLDER]
# FOLDER is /opt/ensembler-edge for root, else ~/.local/share/ensembler-edge. It is replaced whole, or left as it was.
set -eu
umask 022

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
if [ "$(id -u)" = 0 ]; then
    folder=${1:-/opt/ensembler-edge}
    commands=/usr/local/bin
else
    [ -n "${HOME:-}" ] || fail "there is no HOME; say where to: sh install.sh FOLDER"
    folder=${1:-$HOME/.local/share/ensembler-edge}
    commands=$HOME/.local/bin
fi
folder=${folder%/}
case $folder in
    /*) ;;
    *) folder=$PWD/$folder ;;
esac
# Python takes modules from where it is started, pip settings from the environment: neither is this script's.
cd /
for name in $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do
    unset "$name"
done
export PIP_CONFIG_FILE=/dev/null PYTHONNOUSERSITE=1

found=$(dpkg --print-architecture 2> /dev/null || uname -m)
[ "$found" = "@ARCHITECTURE@" ] ||
    fail "this is for @ARCHITECTURE@, and this system is $found; export it again with another --target"
command -v python3 > /dev/null || fail "there is no python3; sudo apt install python3-venv"
found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$found" = "@PYTHON@" ] ||
    fail "this is for Python @PYTHON@ (@RELEASE@), and this system has $found; export it again with another --target"
# Debian's own pip, which python3-venv brings, runs from its wheel: to install it first would take longer than the rest.
pip=$(ls /usr/share/python-wheels/pip-*.whl 2> /dev/null | tail -n 1)
[ -n "$pip" ] || fail "Python has no venv; sudo apt install python3-venv"
for module in @MODULES@; do
    python3 -c "import $module" 2> /dev/null || fail "Python has no $module; sudo apt install @DEPENDS@"
done
(cd "$here" && sha256sum --check --quiet SHA256SUMS) ||
    fail "a file is damaged; copy the archive again, and unpack it on a disk with space"

mark=.ensembler-edge  # of a folder that this script made
before=$folder.before
if [ -f "$before/$mark" ]; then
    # An installation was cut off: what lies in its place is not finished.
    rm -rf "$folder"
    mv "$before" "$folder"
fi
[ ! -e "$folder" ] || [ -f "$folder/$mark" ] ||
    fail "$folder is something else; move it away, or name another folder: sh install.sh FOLDER"
mkdir -p "$(dirname "$folder")" "$commands"
space=$(df -Pk "$(dirname "$folder")" | awk 'NR == 2 { print $4 }')
[ "$space" -ge @KILOBYTES@ ] ||
    fail "$(dirname "$folder") has $((space / 1024)) MB left and @KILOBYTES@ kB are needed; make space, or name another folder"

# A venv knows its own place, so it is made there; what was there waits beside it until the new one works.
undo() {
    rm -rf "$folder"
    if [ -e "$before" ]; then
        mv "$before" "$folder"
    fi
    echo "install.sh: it failed, and nothing was changed" >&2
}
if [ -e "$folder" ]; then
    mv "$folder" "$before"
fi
trap 'exit 130' HUP INT TERM
trap undo EXIT
mkdir "$folder"
: > "$folder/$mark"
# The system's packages stay in sight: picamera2 is one of them.
python3 -I -m venv --without-pip --system-site-packages "$folder"
PYTHONPATH=$pip "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --ignore-installed --require-hashes --find-links "$here/wheels" --requirement "$here/requirements.txt"
"$folder/bin/ensembler" --version > /dev/null
trap - EXIT
rm -rf "$before"
ln -sf "$folder/bin/ensembler" "$commands/ensembler"
# A link would not do: Python would not know that it is in a venv.
printf '#!/bin/sh\nexec "%s/bin/python" "$@"\n' "$folder" > "$commands/ensembler-python"
chmod 755 "$commands/ensembler-python"
echo "installed in $folder; next: $commands/ensembler doctor"
