# mcm_jax and its dependencies, at the versions of launch/constraints.txt. launch/docker.sh builds and runs it; the
# manifests of launch/gke/ use the same image.
FROM python:3.12-slim-bookworm

# cpu, gpu, gpu13 or tpu
ARG ACCELERATOR=cpu
# Any user that the container runs as can write to /tmp.
ENV MCM_ACCELERATOR=$ACCELERATOR MCM_VENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp

WORKDIR /opt/mcm_jax

# The dependencies first: they change rarely, and get a layer of their own.
COPY setup.cfg setup.py pyproject.toml README.md LICENSE ./
COPY launch/constraints.txt launch/environment.sh launch/
COPY mcm_jax/__init__.py mcm_jax/
COPY configs/__init__.py configs/
# With the client of buckets, which the variant for GPUs does not bring.
RUN bash -ec '. launch/environment.sh && mcm_environment gcs' && rm -rf /tmp/* /tmp/.cache
COPY . .

CMD ["python", "-m", "mcm_jax.train", "--help"]
