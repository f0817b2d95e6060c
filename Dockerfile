# One image for all programs. The command selects one: python -m services.consumer, services.api, …
# It contains no settings and no secrets. Its file system may be read-only, except for /tmp.

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
# A number, so that Kubernetes can verify that the user is not root.
USER 10001:10001
CMD ["python", "-m", "services.admin", "--help"]
