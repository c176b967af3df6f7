#!/bin/sh
# Remove from installed packages what serving never opens: headers for building torch's extensions,
# and test programs. 190 MB; RECORD still lists the files.
set -eu
cd "$1"
rm -rf torch/include torch/share torch/test torch/bin/protoc* torch/bin/test_* torch/bin/*Test
find . -type d -name tests -prune -exec rm -rf {} +
