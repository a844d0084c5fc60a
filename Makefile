# What can be done here? `make` lists it. Each target installs what it misses (scripts/setup).

.PHONY: help demo test bench soak lint ci

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Start two backends and Cloakroom in front of them, and say what to open
	@scripts/setup cmake cc
	cargo run --locked -- demo

test: ## Run every test; those with Redis, Valkey and Chromium start their own
	@scripts/setup cmake cc redis-server valkey-server chromium node browser-tools openssl
	cargo test --locked

bench: ## Measure what a session costs, beside bare pingora, nginx and HAProxy (about half an hour)
	@scripts/setup cmake cc redis-server nginx lua-nginx-redis haproxy
	cargo bench --locked --bench hot_path
	cargo bench --locked --bench uneven
	cargo bench --locked --no-run --bench pingora_defaults
	cargo bench --locked --bench side_by_side

TIME ?= 10m

soak: ## Kill everything at random under traffic for TIME=10m, and say who noticed
	@scripts/setup cmake cc redis-server
	cargo test --locked --test soak -- --time $(TIME) $(if $(SEED),--seed $(SEED))

lint: ## Look for what the compiler lets pass
	@scripts/setup cmake cc
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

ci: ## Everything that must hold before a change is merged
	.ci/run
