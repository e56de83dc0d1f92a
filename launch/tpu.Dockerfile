# The project for Cloud TPUs.
#   docker build -f launch/tpu.Dockerfile -t IMAGE .
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1
WORKDIR /irg
# The packages are a layer of their own: after a change of the code, only the code is sent.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY irg_jax/__init__.py irg_jax/
RUN pip install --no-cache-dir --editable ".[tpu]"
COPY irg_jax irg_jax
COPY configs configs
CMD ["irg", "--help"]
