# docker build -t offline_zoo --build-arg COMMIT=$(git rev-parse HEAD) .
# docker run --gpus all -v offline_zoo_runs:/home/zoo/runs -v offline_zoo_cache:/home/zoo/.cache offline_zoo \
#   -m offline_zoo.dqn.run_atari --environment_name=pong
#
# CUDA comes with JAX's wheels, so the host needs only NVIDIA's driver and container toolkit. Without
# `--gpus all` the same image runs on CPU.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 zoo
WORKDIR /home/zoo

# Dependencies first: they change more seldom than the code.
COPY requirements-cuda.lock src/
RUN pip install --no-cache-dir --require-hashes -r src/requirements-cuda.lock
COPY . src/
RUN pip install --no-cache-dir --no-deps --no-build-isolation ./src

# For config.json: the image holds no checkout to ask.
ARG COMMIT
ENV OFFLINE_ZOO_COMMIT=$COMMIT

USER zoo
# Made now, so that named volumes, when new, belong to the user. (A directory of the host must be
# writable by uid 1000.)
RUN mkdir runs .cache
ENTRYPOINT ["python"]
