#!/usr/bin/env bash
# Bring a headless Chromium into .browser for tests/report/test_report_browser.py, where none is installed.
# It is inside a package of the npm registry, so that nothing else is downloaded; needs npm and node.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=147.0.0
mkdir -p .browser
cd .browser
npm pack --silent "@sparticuz/chromium@$VERSION" >/dev/null
tar xzf "sparticuz-chromium-$VERSION.tgz"
node -e '
const { brotliDecompressSync } = require("node:zlib");
const { readFileSync, writeFileSync } = require("node:fs");
for (const [packed, name] of [["chromium.br", "chromium"], ["al2023.tar.br", "lib.tar"], ["fonts.tar.br", "fonts.tar"]]) {
  writeFileSync(name, brotliDecompressSync(readFileSync(`package/bin/${packed}`)));
}'
chmod +x chromium
for archive in lib.tar fonts.tar; do tar xf "$archive"; done
rm -rf package ./*.tar ./*.tgz
echo "$PWD/chromium"
