# syntax=docker/dockerfile:1
# Cloakroom in a container of its own: the binary, the authorities that it trusts, and no shell.
#
#   docker build -t cloakroom .
#   docker run -p 8443:8443 -v ./conf:/etc/cloakroom:ro cloakroom
#
# For that, conf/cloakroom.toml has a listener with `address = "0.0.0.0:8443"`: loopback inside a container is reached by
# nobody outside. Such a listener needs `cert` and `key`, `scheme = "https"` behind a proxy that terminates TLS, or
# `insecure = true`. Another port is another `-p`. User 65532 must be able to read all files that it names.

FROM rust:1-bookworm AS build
# zlib-ng, which pingora uses, builds with cmake.
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
# Crates and what they became stay in caches: a change of ours compiles ours only. The caches are not part of the
# image, so the binary is copied out.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin cloakroom \
    && cp target/release/cloakroom /cloakroom

FROM gcr.io/distroless/cc-debian12
COPY --from=build /cloakroom /usr/local/bin/cloakroom
# By number, so that an orchestrator can see that it is not root. Its ports are above 1023.
USER 65532:65532
EXPOSE 8080 8443
# Asks the admin listener, which by default is on loopback inside the container.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
    CMD ["/usr/local/bin/cloakroom", "health"]
ENTRYPOINT ["/usr/local/bin/cloakroom"]
CMD ["run", "--config", "/etc/cloakroom/cloakroom.toml"]
