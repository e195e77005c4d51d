# An image with the command `gradsift`. It keeps its work in /data, so mount a folder there:
#
#   docker build -t gradsift .
#   docker run --rm -v "$PWD:/data" gradsift experiment=smoke
#   docker run --rm --gpus all -v "$PWD:/data" gradsift data=json data.path=mine.jsonl proxy=gpt2 stop_after=selection
#
# Build arguments:
#   TORCH    requirement of PyTorch. The default wheels bring CUDA; for a small CPU image, or an older driver, give
#            "torch @ ADDRESS" with the address of a wheel from PyTorch's installation page.
#   EXTRAS   optional extras of gradsift, separated by commas.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG TORCH=torch
ARG EXTRAS=launchers,search,human

# the compiled CPU kernels need a C++ compiler at run time
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY src src
RUN pip install --no-cache-dir -c constraints.txt "$TORCH" ".[${EXTRAS}]"

RUN useradd --create-home gradsift
USER gradsift
WORKDIR /data
ENV GRADSIFT_ARTIFACTS=/data/artifacts
ENTRYPOINT ["gradsift"]
CMD ["--help"]
