# CPU image: the bundled model answers from it; no network is needed after the build.
FROM python:3.11-slim
RUN useradd --create-home mmroute
WORKDIR /home/mmroute/app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN python -m pip install --no-cache-dir -c constraints.txt .
USER mmroute
HEALTHCHECK --interval=60s --timeout=20s CMD mmroute env >/dev/null || exit 1
ENTRYPOINT ["mmroute"]
CMD ["demo", "--out", "/tmp"]
