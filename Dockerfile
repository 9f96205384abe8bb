# mcm_jax and all it needs, at the versions of launch/constraints.txt. Built and run by launch/docker.sh; the
# manifests of launch/gke/ take the same image.
FROM python:3.12-slim-bookworm

# cpu, gpu or tpu
ARG ACCELERATOR=cpu
# Whoever the container runs as can write to /tmp.
ENV MCM_ACCELERATOR=$ACCELERATOR MCM_VENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp

WORKDIR /opt/mcm_jax

# The packages first: they change rarely, and are a layer of their own.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY launch/constraints.txt launch/environment.sh launch/
COPY mcm_jax/__init__.py mcm_jax/
RUN bash -ec '. launch/environment.sh && mcm_environment' && rm -rf /tmp/* /tmp/.cache
COPY . .

CMD ["python", "-m", "mcm_jax.train", "--help"]
