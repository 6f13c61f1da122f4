# CPU image: the bundled model answers from it; no network is needed after the build. Give the build the index of CPU wheels that
# PyTorch's install page names; without it pip takes the CUDA build of torch, gigabytes that nothing here uses:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t IMAGE .
# The gateway:
#   docker run -p 127.0.0.1:8000:8000 IMAGE serve --host 0.0.0.0 --insecure
FROM python:3.11-slim
RUN useradd --create-home mmroute
WORKDIR /home/mmroute/app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
ARG PIP_EXTRA_INDEX_URL=""
RUN python -m pip install --no-cache-dir -c constraints.txt ".[serve]"
USER mmroute
HEALTHCHECK --interval=60s --timeout=20s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')" \
    2>/dev/null || mmroute env >/dev/null || exit 1
ENTRYPOINT ["mmroute"]
EXPOSE 8000
CMD ["demo", "--out", "/tmp"]
