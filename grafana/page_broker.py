"""Is it healthy, what do visitors get, and where does the time go?  One entry a panel."""

from shapes import OUTCOMES, TOKENS, Dashboard, Panel, Row, Stat, States, quantiles

UNSEEN = "Exists only with a shared store."
NO_FILE = "Exists only with a state file."

BROKER = Dashboard(
    name="broker",
    uid="embed-token-broker",
    title="Embed token broker",
    description="Is it healthy, what do visitors get, and where does the time go?",
    rows=[
        Row(
            title="Is it healthy?",
            across=8,
            height=4,
            panels=[
                Stat(
                    title="Alerts",
                    unit="short",
                    description="Alerts of config/prometheus/rules.yml that fire now. Their names "
                    "are on the regions that they draw on every panel; grafana/RUNBOOK.md says "
                    "what to do.",
                    queries={
                        "firing": 'count(ALERTS{alertname=~"Broker.*", alertstate="firing", '
                        'job=~"$job|"}) or vector(0)'
                    },
                    alarm=1,
                ),
                Stat(
                    title="Instances up",
                    unit="percentunit",
                    description="Share of the scraped instances that answered. Alerts: BrokerDown, "
                    "BrokerAbsent.",
                    queries={"up": "avg(up{@})"},
                ),
                Stat(
                    title="Requests",
                    unit="reqps",
                    description="Token requests a second, whatever became of them.",
                    queries={"requests": "sum(rate(broker_requests_total{@}[~]))"},
                ),
                Stat(
                    title="Served",
                    unit="percentunit",
                    description="Share of requests that got a token.",
                    queries={
                        "served": f"sum(rate(broker_requests_total{{@, {TOKENS}}}[~])) "
                        "/ sum(rate(broker_requests_total{@}[~]))"
                    },
                ),
                Stat(
                    title="Reuse",
                    unit="percentunit",
                    description="Share of the tokens handed out that the visitor already had. "
                    "Low is normal while most visitors are new.",
                    queries={
                        "reuse": 'sum(rate(broker_requests_total{@, outcome="reused"}[~])) '
                        f"/ sum(rate(broker_requests_total{{@, {TOKENS}}}[~]))"
                    },
                ),
                Stat(
                    title="Failed or shed",
                    unit="percentunit",
                    description="Share of requests answered 5xx: the vendor failed, or there was "
                    "no budget.",
                    queries={
                        "failed": 'sum(rate(broker_requests_total{@, outcome=~"failed|shed"}[~])) '
                        "/ sum(rate(broker_requests_total{@}[~]))"
                    },
                    alarm=0.05,
                ),
                Stat(
                    title="Tokens held",
                    unit="short",
                    description="Tokens that can be handed out again without a mint.",
                    queries={"tokens": "sum(broker_tokens_cached{@})"},
                ),
                Stat(
                    title="Running",
                    unit="none",
                    description="Version and Python of each instance.",
                    queries={"{{version}} on {{python}}": "broker_build_info{@}"},
                    text="name",
                ),
            ],
        ),
        Row(
            title="What do visitors get?",
            panels=[
                Panel(
                    title="Requests by outcome",
                    unit="reqps",
                    description="minted, reused and coalesced got a token (coalesced: by joining "
                    "a mint that was under way); limited is a 429, shed a 503, failed what the "
                    "vendor or the broker could not do; the others are callers' mistakes.",
                    queries={"{{outcome}}": "sum by (outcome) (rate(broker_requests_total{@}[~]))"},
                    stacked=True,
                    colours=OUTCOMES,
                ),
                Panel(
                    title="Where tokens come from",
                    unit="percentunit",
                    description="Of the tokens handed out: the share that was held already, and "
                    "the share that joined somebody else's mint.",
                    queries={
                        name: f'sum(rate(broker_requests_total{{@, outcome="{name}"}}[~])) '
                        f"/ sum(rate(broker_requests_total{{@, {TOKENS}}}[~]))"
                        for name in ("reused", "coalesced", "minted")
                    },
                    colours=OUTCOMES,
                ),
                Panel(
                    title="Token life at hand-out",
                    unit="s",
                    description="How long the tokens that are handed out will live. The lowest "
                    "percent must stay above [reuse] floor, or floor_in_outage in an outage.",
                    queries=quantiles("broker_token_remaining_seconds", 0.01, 0.1, 0.5),
                ),
            ],
        ),
        Row(
            title="Where does the time go?",
            panels=[
                Panel(
                    title="Time to answer",
                    unit="s",
                    description="From the parsed head of a request to its answer: 99 % are faster, "
                    "by outcome. A reuse takes microseconds; a mint, what the vendor takes.",
                    queries={
                        "{{outcome}}": "histogram_quantile(0.99, sum by (le, outcome) "
                        "(rate(broker_request_duration_seconds_bucket{@}[~])))"
                    },
                    colours=OUTCOMES,
                ),
                Panel(
                    title="Time spent, by outcome",
                    unit="short",
                    description="Seconds of waiting in each second, over all visitors: who pays "
                    "for what is slow.",
                    queries={
                        "{{outcome}}": "sum by (outcome) "
                        "(rate(broker_request_duration_seconds_sum{@}[~]))"
                    },
                    stacked=True,
                    colours=OUTCOMES,
                ),
                Panel(
                    title="Event loop lag",
                    unit="s",
                    description="How late a timer woke, sampled twice a second: everybody waits "
                    "that long. Alert: BrokerEventLoopLag.",
                    queries=quantiles("broker_event_loop_lag_seconds", 0.5, 0.99),
                    alarm=0.1,
                ),
            ],
        ),
        Row(
            title="Limits",
            panels=[
                Panel(
                    title="Admitted, near, denied, dry run",
                    unit="reqps",
                    description="Of all limits together: requests that got a token; admitted with "
                    "less than a fifth of a burst left; refused; refused but for dry_run.",
                    queries={
                        "admitted": f"sum(rate(broker_requests_total{{@, {TOKENS}}}[~]))",
                        "near": "sum(rate(broker_near_limit_total{@}[~]))",
                        "denied": "sum(rate(broker_rejections_total{@}[~]))",
                        "dry run": "sum(rate(broker_dry_run_rejections_total{@}[~]))",
                    },
                    colours={
                        "admitted": "green",
                        "near": "yellow",
                        "denied": "red",
                        "dry run": "purple",
                    },
                ),
                Panel(
                    title="Denied, by limit",
                    unit="reqps",
                    description="Every 429 by the limit that refused, and every 503 for want of "
                    "budget. Alert: BrokerRejections.",
                    queries={"{{limit}}": "sum by (limit) (rate(broker_rejections_total{@}[~]))"},
                    stacked=True,
                ),
                Panel(
                    title="Near, by limit",
                    unit="reqps",
                    description="Admitted with less than a fifth of the burst left: who will be "
                    "denied next.",
                    queries={"{{limit}}": "sum by (limit) (rate(broker_near_limit_total{@}[~]))"},
                    stacked=True,
                ),
                Panel(
                    title="Dry run, by limit",
                    unit="reqps",
                    description="What a limit with dry_run = true would have refused.",
                    queries={
                        "{{limit}}": "sum by (limit) (rate(broker_dry_run_rejections_total{@}[~]))"
                    },
                    stacked=True,
                ),
                Panel(
                    title="Buckets tracked",
                    unit="short",
                    description="Buckets in memory: visitors, agents, clients, addresses that "
                    "fail. Bounded by [limits] max_tracked.",
                    queries={"{{limit}}": "sum by (limit) (broker_buckets_tracked{@})"},
                ),
                Panel(
                    title="Decided by a shared bucket",
                    unit="reqps",
                    description="Requests of newcomers while max_tracked is reached: strangers "
                    "share a bucket. Alert: BrokerBucketsOverflowed.",
                    queries={
                        "{{limit}}": "sum by (limit) (rate(broker_buckets_overflowed_total{@}[~]))"
                    },
                ),
            ],
        ),
        Row(
            title="Store",
            panels=[
                Panel(
                    title="Tokens held",
                    unit="short",
                    description="Tokens in memory, by instance. Bounded by [reuse] max_tokens.",
                    queries={"{{instance}}": "broker_tokens_cached{@}"},
                ),
                Panel(
                    title="Tokens dropped",
                    unit="ops",
                    description="expired is their natural end; capacity dropped a token that was "
                    "still good, whose visitor costs another mint. Alert: BrokerTokensEvicted.",
                    queries={
                        "{{cause}}": "sum by (cause) (rate(broker_tokens_evicted_total{@}[~]))"
                    },
                ),
                States(
                    title="Shared store",
                    unit="none",
                    description="Whether instances decide by the store or on their own. Alert: "
                    f"BrokerStoreDegraded. {UNSEEN}",
                    queries={"{{instance}}": "broker_store_degraded{@}"},
                    words={"0": ("shared", "green"), "1": ("on its own", "red")},
                ),
                Panel(
                    title="Store latency",
                    unit="s",
                    description=f"99 % of the operations are faster, by operation. {UNSEEN}",
                    queries={
                        "{{operation}}": "histogram_quantile(0.99, sum by (le, operation) "
                        "(rate(broker_store_duration_seconds_bucket{@}[~])))"
                    },
                ),
                Panel(
                    title="Store operations",
                    unit="ops",
                    description=f"Round trips to the store, by operation. {UNSEEN}",
                    queries={
                        "{{operation}}": "sum by (operation) "
                        "(rate(broker_store_duration_seconds_count{@}[~]))"
                    },
                    stacked=True,
                ),
                Panel(
                    title="Store errors",
                    unit="ops",
                    description=f"Operations that failed, by reason. {UNSEEN}",
                    queries={
                        "{{reason}}": "sum by (reason) (rate(broker_store_errors_total{@}[~]))"
                    },
                    stacked=True,
                ),
            ],
        ),
        Row(
            title="Runtime",
            panels=[
                Panel(
                    title="CPU, by worker",
                    unit="percentunit",
                    description="Share of one core that each worker uses; a worker has one thread "
                    "that does the work, so 100 % is all of it.",
                    queries={
                        "{{instance}} {{worker}}": "rate(broker_worker_cpu_seconds_total{@}[~])"
                    },
                ),
                Panel(
                    title="Memory, by worker",
                    unit="bytes",
                    description="Resident memory of each worker.",
                    queries={
                        "{{instance}} {{worker}}": "broker_worker_resident_memory_bytes{@}",
                    },
                ),
                Panel(
                    title="Workers",
                    unit="short",
                    description="Workers that run, and how many were replaced in the last hour, "
                    "those that hung among them. Alerts: BrokerWorkersRestart, BrokerWorkerHung.",
                    queries={
                        "{{instance}} running": "broker_workers{@}",
                        "{{instance}} replaced": "increase(broker_worker_restarts_total{@}[1h])",
                        "{{instance}} hung": "increase(broker_worker_hangs_total{@}[1h])",
                    },
                ),
                Panel(
                    title="CPU of the scraped process",
                    unit="percentunit",
                    description="Share of one core: the broker itself, or the supervisor of its "
                    "workers.",
                    queries={"{{instance}}": "rate(process_cpu_seconds_total{@}[~])"},
                ),
                Panel(
                    title="Memory of the scraped process",
                    unit="bytes",
                    description="Resident memory: the broker itself, or the supervisor of its "
                    "workers.",
                    queries={"{{instance}}": "process_resident_memory_bytes{@}"},
                ),
                Panel(
                    title="Open files",
                    unit="short",
                    description="Sockets and files; connections are refused at the limit.",
                    queries={
                        "{{instance}} open": "process_open_fds{@}",
                        "{{instance}} limit": "process_max_fds{@}",
                    },
                ),
                Panel(
                    title="Garbage collections",
                    unit="ops",
                    description="Runs of Python's collector, by generation; the oldest one pauses "
                    "longest.",
                    queries={
                        "generation {{generation}}": "sum by (generation) "
                        "(rate(python_gc_collections_total{@}[~]))"
                    },
                ),
                Panel(
                    title="Configuration reloads",
                    unit="short",
                    description="In the last hour. After a failure the old settings are in force, "
                    "as long as the last one is shown as failed. Alert: BrokerReloadFailed.",
                    queries={
                        "{{outcome}}": "sum by (outcome) "
                        "(increase(broker_config_reloads_total{@}[1h]))",
                        "{{instance}} failed last": "broker_config_reload_failed{@}",
                    },
                    colours={"success": "green", "failure": "red"},
                ),
                Panel(
                    title="Up since",
                    unit="s",
                    description="Time since each instance was started.",
                    queries={"{{instance}}": "time() - process_start_time_seconds{@}"},
                ),
                Panel(
                    title="Connections",
                    unit="short",
                    description="Open on the data listener, over all workers of an instance. "
                    "Without the fast lane a request takes three times the CPU; the log says why "
                    "it is off.",
                    queries={
                        "{{instance}}": "broker_connections{@}",
                        "{{instance}} without the fast lane": "broker_fast_lane_off{@}",
                    },
                ),
                Panel(
                    title="Log lines lost",
                    unit="short",
                    description="In the last hour, because standard error was full, gone or "
                    "failed. Alert: BrokerLogDropsLines.",
                    queries={"{{instance}}": "increase(broker_log_lines_dropped_total{@}[1h])"},
                ),
                Panel(
                    title="Background tasks restarted",
                    unit="short",
                    description="In the last hour, by task: each ended by an exception, which the "
                    "log names. Alert: BrokerBackgroundTaskRestarted.",
                    queries={
                        "{{instance}} {{task}}": "increase(broker_background_restarts_total{@}[1h])"
                    },
                ),
            ],
        ),
        Row(
            title="Sessions",
            panels=[
                Panel(
                    title="Tokens asked about",
                    unit="reqps",
                    description="By proxies (verify) and backends (introspect), by the verdict. "
                    "Refused ones are expired, revoked or forged: a wave of them is an attack, or "
                    "a key that a viewer has and the broker has not.",
                    queries={
                        "{{verdict}}": "sum by (verdict) (rate(broker_token_checks_total{@}[~]))"
                    },
                ),
                Panel(
                    title="Sessions ended",
                    unit="ops",
                    description="By revoke, or by the operator: before their time, that is.",
                    queries={"{{instance}}": "rate(broker_sessions_ended_total{@}[~])"},
                ),
                Panel(
                    title="Sessions on record",
                    unit="short",
                    description="By instance. Bounded by [sessions] max_recorded: at the bound the "
                    "oldest record goes, and a token of the vendor's is no longer known here.",
                    queries={"{{instance}}": "broker_sessions_recorded{@}"},
                ),
            ],
        ),
        Row(
            title="State file",
            panels=[
                States(
                    title="State file",
                    unit="none",
                    description="Whether what is handed out and ended survives the process. "
                    f"Alerts: BrokerStateFileDegraded, BrokerStateFileMovedAside. {NO_FILE}",
                    queries={
                        "{{instance}}": "broker_state_file_degraded{@}",
                        "{{instance}} at its start": "broker_state_file_moved_aside{@}",
                    },
                    words={"0": ("written", "green"), "1": ("not kept", "red")},
                ),
                Panel(
                    title="State file errors",
                    unit="ops",
                    description="Writes that failed, by reason, and tokens that were handed out "
                    f"before they were written. {NO_FILE}",
                    queries={
                        "{{reason}}": "sum by (reason) "
                        "(rate(broker_state_file_errors_total{@}[~]))",
                        "late": "sum(rate(broker_state_file_late_total{@}[~]))",
                    },
                ),
                Panel(
                    title="State file size",
                    unit="bytes",
                    description=f"The file and its log, by instance. {NO_FILE}",
                    queries={"{{instance}}": "broker_state_file_bytes{@}"},
                ),
            ],
        ),
    ],
)
