#!/usr/bin/env bash
# Packs SGLang for a GPU machine without a network: Python 3.12, CUDA 13, torch 2.11 (cu130), sm_90, beside what is in
# image.txt. Fails where a package of the kit requires another that is in no list here, or imports one that is left out.
# Left out: FlashAttention 3 (1.1 GB), other architectures, test and diffusion code: checks.py serves with
# --attention-backend triton then. In it is the entry point by which SGLang finds our plugin in an onlinespec that is
# on PYTHONPATH and not installed.
# usage: make_kit.sh 0.5.17|0.5.23 OUTFILE.tar.xz
# there: mkdir SITE && tar -C SITE -xJf OUTFILE.tar.xz && PYTHONPATH=SITE:$PWD make gpu PYTHON=python
set -euo pipefail
python=${PYTHON:-python3} # with pip and packaging
here=$(cd "$(dirname "$0")" && pwd)
version=$1 out=$(realpath -m "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
platforms=()
for glibc in 2_34 2_28 2_27 2_26 2_24 2_17 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --abi cp312 --abi abi3 --abi none "${platforms[@]}" -d "$work/wheels" -r "$here/kit-$version.txt"
site=$work/site
mkdir "$site"
for wheel in "$work"/wheels/*.whl; do
  case $wheel in
    *sglang_kernel-*) unzip -q -o "$wheel" -d "$site" -x '*/flash_ops*' '*/infllm_ops*' '*/flashmla_ops*' '*/sm100/*' ;;
    *) unzip -q -o "$wheel" -d "$site" ;;
  esac
done
rm -f "$site"/xgrammar/lib/*.a "$site"/sglang/srt/rust_extensions/_{bench,multimodal}*.so
find "$site" -name '*.so' -size +4M ! -name 'common_ops*' -exec strip --strip-unneeded {} \;
rm -rf "$site"/sglang/{multimodal_gen,test,benchmark} "$site"/IPython/*/tests "$site"/{tools,lib,bin}
info=$site/onlinespec-0.dist-info
mkdir "$info"
printf 'Metadata-Version: 2.1\nName: onlinespec\nVersion: 0\n' > "$info/METADATA"
printf '[sglang.srt.plugins]\nonlinespec = onlinespec.plugin.entry:register\n' > "$info/entry_points.txt"
cp -r "$here/stand_ins/$version/." "$site"
"$python" "$here/kit_needs.py" "$site"
"$python" "$here/kit_imports.py" "$site"
find "$site" -name __pycache__ -prune -exec rm -rf {} +
tar -C "$site" -c . | xz -T0 -9 > "$out"
du -h "$out"
