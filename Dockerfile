# The project on a processor, without a GPU:
#
#   docker build -t w2r2 .
#   docker run --rm -v "$PWD/build:/w2r2/build" w2r2 make repro
#   docker run --rm w2r2 make test
#
# The PyTorch of pip's default index brings CUDA along, which is not used. To leave it out, name an index that has CPU wheels:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t w2r2 .
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /w2r2

# pip reads its own variables from the environment, and build arguments are part of it
ARG PIP_EXTRA_INDEX_URL PIP_INDEX_URL PIP_FIND_LINKS
COPY requirements.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.lock

# with .git: DVC and `make miniature` ask git which files there are
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --editable . \
    && git config --global --add safe.directory '*'

CMD ["make"]
