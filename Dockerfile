# One image for every program of ours; which one runs is the command: python -m services.consumer, services.api, …
# No settings and no secrets are in it, and nothing in it needs to be written while it runs, but for /tmp.

FROM python:3.13-slim AS build
COPY requirements/services.txt /tmp/services.txt
RUN python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary :all: --require-hashes --requirement /tmp/services.txt
COPY orderlib /opt/app/orderlib
COPY services /opt/app/services
# Compiled here, because the file system is read-only later.
RUN /opt/venv/bin/python -m compileall -q /opt/venv/lib /opt/app

FROM python:3.13-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/app /opt/app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/app
# A number, so that whoever starts it can tell that it is not root.
USER 10001:10001
CMD ["python", "-m", "services.admin", "--help"]
