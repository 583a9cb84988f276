#!/bin/sh
# build.sh WHEEL PIP OUTPUT_DIRECTORY: a Debian package of the agent as a service.
#
# Debian has not all the libraries, or older ones: the package holds an environment of its own in /opt/ckptsvc, made here
# with this machine's /usr/bin/python3 from the wheel and the versions in constraints.txt. It is for this architecture
# and this minor version of Python. PIP is a pip (23.1 or newer) that may install into another interpreter.
set -eu

wheel=$1 pip=$2 output=$3
here=$(cd "$(dirname "$0")" && pwd)
deploy=$(dirname "$here")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
umask 022

version=$(basename "$wheel" | cut -d- -f2)
minor=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')
maintainer="the ckptsvc authors <ckptsvc@example.org>"
architecture=$(dpkg --print-architecture)
package=$root/package
chmod 755 "$root"

/usr/bin/python3 -m venv --without-pip "$package/opt/ckptsvc"
rm -f "$package"/opt/ckptsvc/bin/[Aa]ctivate*
$pip --python "$package/opt/ckptsvc/bin/python" install --no-input --disable-pip-version-check --no-compile --quiet \
	-c "$deploy/../constraints.txt" "$wheel"
# What pip has written into scripts is where they were made.
grep -rlIZ "$package/opt/ckptsvc" "$package/opt/ckptsvc/bin" "$package/opt/ckptsvc/pyvenv.cfg" |
	xargs -0 --no-run-if-empty sed -i "s#$package/opt/ckptsvc#/opt/ckptsvc#g"
# Nobody compiles it later: root's umask could leave what only root can read. Some packages hold templates that are no
# program yet, hence "|| true".
"$package/opt/ckptsvc/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
	-s "$package" -p / "$package/opt/ckptsvc/lib" || true
# Programs of libraries, where the wheel lay, and bits that make a library a program.
find "$package/opt/ckptsvc/bin" -type f ! -name ckptsvc -delete
find "$package/opt/ckptsvc/lib" -path '*/ckptsvc-*.dist-info/direct_url.json' -delete
find "$package/opt/ckptsvc/lib" -name '*.so*' -type f -exec chmod 644 {} +
find "$package/opt/ckptsvc" -type d -empty -delete
find "$package/opt/ckptsvc" -name RECORD -path '*dist-info*' -exec sed -i \
	-e '/__pycache__/d' -e '/^[./]*\/bin\//d' -e '/direct_url\.json,/d' {} +

mkdir -p "$package/usr/bin" "$package/etc/ckptsvc" "$package/usr/lib/systemd" "$package/usr/share/doc/ckptsvc" \
	"$package/usr/lib/tmpfiles.d" "$package/usr/share/lintian/overrides" "$package/usr/share/man/man1" "$package/DEBIAN"
ln -s /opt/ckptsvc/bin/ckptsvc "$package/usr/bin/ckptsvc"
install -D -m 644 -t "$package/usr/lib/systemd/system" "$deploy"/systemd/*.service
install -D -m 644 -t "$package/usr/lib/systemd/user" "$deploy"/systemd/user/*.service
install -m 644 -t "$package/usr/lib/tmpfiles.d" "$deploy"/systemd/tmpfiles.d/ckptsvc.conf
install -m 644 -t "$package/etc/ckptsvc" "$deploy/systemd/config.toml"
install -D -m 644 -t "$package/usr/share/doc/ckptsvc/examples" "$deploy"/systemd/examples/*.conf
install -m 644 "$deploy/systemd/logind.conf.d/ckptsvc.conf" "$package/usr/share/doc/ckptsvc/examples/logind.conf"
install -m 644 "$deploy/systemd/README.md" "$package/usr/share/doc/ckptsvc/README.md"
install -m 644 -t "$package/usr/share/doc/ckptsvc" "$here/copyright" "$deploy/../CHANGELOG.md"
install -m 644 "$here/lintian-overrides" "$package/usr/share/lintian/overrides/ckptsvc"
gzip -9nc "$here/ckptsvc.1" > "$package/usr/share/man/man1/ckptsvc.1.gz"
gzip -9nc > "$package/usr/share/doc/ckptsvc/changelog.gz" <<END
ckptsvc ($version) unstable; urgency=medium

  * See CHANGELOG.md.

 -- $maintainer  $(date -R ${SOURCE_DATE_EPOCH:+-d "@$SOURCE_DATE_EPOCH"})
END

echo /etc/ckptsvc/config.toml > "$package/DEBIAN/conffiles"
install -m 755 -t "$package/DEBIAN" "$here/postinst" "$here/prerm" "$here/postrm"
cat > "$package/DEBIAN/control" <<END
Package: ckptsvc
Version: $version
Architecture: $architecture
Maintainer: $maintainer
Section: admin
Priority: optional
Installed-Size: $(du -sk "$package" | cut -f1)
Depends: python3 (>= $minor), python3 (<< $next), libc6
Recommends: systemd
Description: checkpoints and fault tolerance for training jobs, as a service
 The agent of a node: it keeps the snapshots of training jobs in memory, writes
 them to the stores of their users, watches the ranks, and has them started
 again. This package has the service and the command line; training programs
 import ckptsvc from an environment of their own.
END
(cd "$package" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum > DEBIAN/md5sums)
mkdir -p "$output"
dpkg-deb --root-owner-group -Zgzip --build "$package" "$output/ckptsvc_${version}_$architecture.deb"
