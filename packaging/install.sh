#!/bin/sh
# Installs Meshwork from a directory or URL that has its packages and their SHA256SUMS. It needs no terminal.
#
#   install.sh FROM [PACKAGE..]     PACKAGE: meshwork-agent (as without one), meshwork-control, meshwork-cli
#
# Exit codes: 0 installed; 1 it could not be; 2 what was typed is wrong.
set -eu

say() { echo "install.sh: $*" >&2; }
fail() {
    say "$1"
    exit "${2:-1}"
}

[ $# -ge 1 ] || fail "say where the packages are: install.sh DIRECTORY-OR-URL [PACKAGE..]" 2
from=${1%/}
shift
[ $# -ge 1 ] || set -- meshwork-agent
for package; do
    case $package in
    meshwork-agent | meshwork-control | meshwork-cli) ;;
    *) fail "there is no package $package; there are meshwork-agent, meshwork-control and meshwork-cli" 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || fail "packages are installed by root; run it with sudo"

# By what installs here, not by the name of the distribution.
machine=$(uname -m)
if command -v dpkg >/dev/null && command -v apt-get >/dev/null; then
    end=_$(dpkg --print-architecture).deb between=_
elif command -v rpm >/dev/null; then
    end=.$machine.rpm between=-
else
    fail "neither apt nor rpm is here: Meshwork has packages for these two"
fi

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
trap 'exit 1' HUP INT TERM
# apt reads the packages as a user of its own.
chmod 755 "$room"

fetch() {
    case $from in
    http://* | https://*)
        if command -v curl >/dev/null; then
            curl --fail --silent --show-error --location --max-time 600 --output "$room/$1" "$from/$1"
        elif command -v wget >/dev/null; then
            wget --quiet --timeout=60 --output-document="$room/$1" "$from/$1"
        else
            fail "neither curl nor wget is here to fetch $from; install one, or name a directory"
        fi
        ;;
    *) cp "$from/$1" "$room/$1" ;;
    esac || fail "$from/$1 can not be had"
}

fetch SHA256SUMS
files=
for package; do
    # A line is a checksum, two spaces and a name; the version is whatever is there.
    found=
    while read -r _ name; do
        case $name in
        */* | *[!A-Za-z0-9._~+-]*) fail "SHA256SUMS names '$name', which is no package" ;;
        "$package$between"[0-9]*"$end")
            [ -z "$found" ] || fail "$from has both $found and $name; leave one"
            found=$name
            ;;
        esac
    done <"$room/SHA256SUMS"
    [ -n "$found" ] || fail "$from has no $package for this machine ($package$between*$end)"
    fetch "$found"
    awk -v name="$found" '$2 == name' "$room/SHA256SUMS" >"$room/sum"
    (cd "$room" && sha256sum --check --status sum) ||
        fail "$found is not what SHA256SUMS says: fetch it anew; if that does not help, somebody changed it"
    files="$files $room/$found"
done

# shellcheck disable=SC2086 # the names are checked above, and mktemp's has no space
if [ "$between" = _ ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --allow-downgrades \
        -o Dpkg::Options::=--force-confold $files </dev/null >&2
elif command -v dnf >/dev/null; then
    dnf install -y --setopt=localpkg_gpgcheck=0 $files </dev/null >&2
else
    rpm --upgrade --replacepkgs $files </dev/null >&2
fi

for package; do
    case $package in
    meshwork-agent) say "installed $package; nothing of this host's traffic has changed. Next: mesh-agent join TOKEN" ;;
    meshwork-control) say "installed $package. Next: mesh-control init --trust-domain NAME --address HOST:7440, then systemctl enable --now mesh-control" ;;
    *) say "installed $package" ;;
    esac
done
