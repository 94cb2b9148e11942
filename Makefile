.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix campaign trials fuzz bench bench-soak bench-compare bench-poll bench-claim bench-cleanup bench-schedule bench-inbox bench-micro bench-report lint

VERSIONS ?= 14 15 16 17 18
# Tests wait for servers a third of the time.
export RUST_TEST_THREADS ?= $(shell echo $$((3 * $$(getconf _NPROCESSORS_ONLN) / 2)))

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Start throw-away servers, harm them while events flow, and judge the result. ARGS go to `postbox demo`.
	@dev/bootstrap
	@cargo build --release --locked --features demo
	@cargo run --release --locked --quiet --features demo -- demo $(ARGS)

# Servers named in the environment need no download.
test: ## Run all tests, on real Postgres and Kafka.
	@dev/bootstrap
	@test -n "$$DATABASE_URL" -a -n "$$KAFKA_BROKERS" || dev/fetch
	@dev/fetch pgbouncer || echo "going on without PgBouncer" >&2
	@dev/bootstrap python && dev/fetch omni-box spakky || echo "going on without omni-box and spakky" >&2
	@dev/fetch connect || echo "going on without Debezium" >&2
	cargo test --locked
	cargo test --locked --no-default-features --lib

test-matrix: ## Run the tests that need servers, or those that TESTS names, on each Postgres of VERSIONS in turn.
	@dev/bootstrap
	@dev/fetch kafka $(VERSIONS:%=postgres %)
	@cargo test --locked --test it --no-run
	@dev/matrix "$(VERSIONS)" $(TESTS)

campaign: ## Harm everything, at random but for SEED, in RUNS runs, JOBS at a time, in MODE=wal|poll|divided|claims|marks or all, and sum up what the oracle finds.
	@dev/bootstrap
	@dev/fetch
	SEED=$(or $(SEED),1) RUNS=$(or $(RUNS),20) JOBS=$(or $(JOBS),3) MODE=$(MODE) \
		cargo test --release --locked --test it -- --ignored --exact campaign::campaign_of_the_environment --nocapture

trials: ## Measure take-over and recovery TRIALS times each, against what is promised.
	@dev/bootstrap
	@dev/fetch
	TRIALS=$(or $(TRIALS),20) cargo test --release --locked --test it -- --ignored --nocapture --test-threads 1 trials_of

fuzz: ## Look for input that breaks a promise of the decoder or the envelope: RUNS of each target, or SECONDS.
	@dev/bootstrap build
	@cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2; exit 1; }
	@for target in message stream event; do \
		mkdir -p fuzz/found/$$target; \
		cargo fuzz run --sanitizer none $$target fuzz/found/$$target fuzz/corpus/$$target -- -max_len=4096 \
			$(if $(SECONDS),-max_total_time=$(SECONDS),-runs=$(or $(RUNS),1000000)) || exit; \
	done

# What is measured is the release; what measures it is built beside it.
measure = dev/bootstrap && dev/fetch && cargo build --release --locked && \
	cargo bench --profile dev --locked --bench relay --
# A run in full replaces the record that is kept; one with options does not.
runs = $(or $(FILE),$(if $(strip $(options)),target,bench)/runs/$(1).jsonl)
options = $(if $(TRIALS),--trials $(TRIALS)) $(if $(ROWS),--rows $(ROWS)) $(if $(ONLY),--only $(ONLY))

bench: ## Measure postbox beside pg_recvlogical and a bare producer: TRIALS, ROWS, ONLY=drain,start,latency,idle.
	@$(measure) relay --runs $(call runs,relay) $(options)

bench-soak: ## Let it run for MINUTES at half of what this machine can write and carry.
	@$(measure) soak --runs $(or $(FILE),$(if $(MINUTES),target,bench)/runs/soak.jsonl) $(if $(MINUTES),--minutes $(MINUTES))

bench-compare: ## Measure postbox beside Debezium and omni-box: TRIALS, ROWS, ONLY=drain,crash,start,latency,idle.
	@dev/bootstrap && dev/fetch connect
	@dev/fetch omni-box || echo "going on without omni-box" >&2
	@$(measure) compare --runs $(call runs,compare) $(options)

bench-poll: ## Measure postbox that polls, with few and with many published rows in the table: TRIALS, ROWS.
	@$(measure) poll --runs $(call runs,poll) $(options)

bench-claim: ## Measure postbox beside omni-box, on omni-box's table: TRIALS, ROWS.
	@dev/bootstrap && dev/fetch omni-box
	@$(measure) claim --runs $(call runs,claim) $(options)

bench-cleanup: ## Measure what removing old rows costs writers and the relay: TRIALS, and ROWS that are old, by default ten million.
	@$(measure) clean --runs $(call runs,cleanup) $(if $(TRIALS),--trials $(TRIALS)) $(if $(ROWS),--old $(ROWS))

bench-schedule: ## Measure how late scheduled events are, and what ROWS of them that wait cost, by default a million: TRIALS.
	@$(measure) schedule --runs $(call runs,schedule) $(if $(TRIALS),--trials $(TRIALS)) $(if $(ROWS),--scheduled $(ROWS))

bench-inbox: ## Measure an inbox, by who handles, beside omni-box's: TRIALS, ROWS.
	@dev/fetch omni-box || echo "going on without omni-box" >&2
	@$(measure) inbox --runs $(call runs,inbox) $(options)

bench-micro: ## Measure what an event costs in the pure parts of its way.
	@dev/bootstrap build
	cargo bench --locked --bench micro

bench-report: ## Print the tables of what was measured, and draw the picture.
	@cargo bench --profile dev --locked --quiet --bench relay -- report $(or $(FILE),bench/runs/*.jsonl)

lint: ## Check format, lints, docs, and that what is released has no failpoints.
	@dev/bootstrap build
	cargo fmt --check
	cargo clippy --all-targets --all-features --locked -- -D warnings
	cargo clippy --all-targets --no-default-features --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features --locked
	test -z "$$(cargo tree --locked --edges normal --invert fail 2>/dev/null)"
