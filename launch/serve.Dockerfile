# A server for NVIDIA GPUs; CUDA comes with the packages, the driver with the host.
#   docker build -f launch/serve.Dockerfile -t IMAGE .
#   docker run --gpus all -p 127.0.0.1:8000:8000 IMAGE --checkpoint DIR
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /irg
# The packages are a layer of their own: after a change of the code, only the code is sent.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY irg_jax/__init__.py irg_jax/
RUN pip install --no-cache-dir --editable ".[cuda,gcs,serve]"
COPY irg_jax irg_jax
COPY configs configs
EXPOSE 8000
ENTRYPOINT ["irg", "serve", "--host", "0.0.0.0"]
