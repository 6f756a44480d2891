"""Does the vendor mint, how fast, and how much of the budget is left?  One entry a panel."""

from shapes import Dashboard, Heat, Panel, Row, Stat, States, quantiles

MINTS = {"minted": "blue", "refused": "orange", "failed": "red"}

VENDOR = Dashboard(
    name="vendor",
    uid="embed-token-vendor",
    title="Embed token broker: the vendor",
    description="Does the vendor mint, how fast, and how much of the budget is left? "
    "Budget and vendor panels have data only with [issuer.budget] and the upstream issuer.",
    rows=[
        Row(
            title="Is the vendor well?",
            across=6,
            height=4,
            panels=[
                Stat(
                    title="Mints that gave no token",
                    unit="percentunit",
                    description="Share of the mints that the vendor refused or failed. Alert: "
                    "BrokerMintErrors.",
                    queries={
                        "no token": "sum(rate(broker_mint_duration_seconds_count"
                        '{@, outcome!="minted"}[~])) '
                        "/ sum(rate(broker_mint_duration_seconds_count{@}[~]))"
                    },
                    alarm=0.05,
                ),
                Stat(
                    title="Slow mints",
                    unit="percentunit",
                    description="Share of the mints that took more than 2.5 s, of which there may "
                    "be 1 % in 30 days. Alerts: BrokerMintsSlow, BrokerMintsSlowly.",
                    queries={
                        "slow": "1 - sum(rate(broker_mint_duration_seconds_bucket"
                        '{@, le="2.5"}[~])) '
                        "/ sum(rate(broker_mint_duration_seconds_count{@}[~]))"
                    },
                    alarm=0.01,
                ),
                Stat(
                    title="Mint latency",
                    unit="s",
                    description="99 % of the mints are faster.",
                    queries=quantiles("broker_mint_duration_seconds", 0.99),
                ),
                Stat(
                    title="Calls in a minute",
                    unit="short",
                    description="Calls to the vendor, by all chosen instances together; from one "
                    "egress address it allows 120.",
                    queries={"calls": "sum(rate(broker_upstream_requests_total{@}[~])) * 60"},
                ),
                Stat(
                    title="Budget left",
                    unit="short",
                    description="Calls that would be allowed at this moment: by the one budget of "
                    "a shared store, or by those of all instances.",
                    queries={
                        "left": "max(broker_upstream_budget_remaining{@} "
                        "and on (job, instance) broker_store_degraded{@} == 0) "
                        "or sum(broker_upstream_budget_remaining{@})"
                    },
                ),
                Stat(
                    title="Breakers open",
                    unit="short",
                    description="Breakers that stop calls now. Alerts: "
                    "BrokerCredentialBreakerOpen, BrokerHealthBreakerOpen.",
                    queries={"open": "sum(broker_breaker_open{@})"},
                    alarm=1,
                ),
            ],
        ),
        Row(
            title="Budget and queue",
            across=4,
            panels=[
                Panel(
                    title="Budget left",
                    unit="short",
                    description="Calls that the budget would allow at this moment, by instance: "
                    "at most the burst, 0 while the vendor has asked for a pause; and calls that "
                    "are out: if those stay at the burst, the vendor stands still.",
                    queries={
                        "{{instance}} left": "broker_upstream_budget_remaining{@}",
                        "{{instance}} out": "broker_upstream_calls_outstanding{@}",
                    },
                ),
                Panel(
                    title="Mints waiting",
                    unit="short",
                    description="Mints in the queue for the budget.",
                    queries={"{{instance}}": "broker_upstream_queue_depth{@}"},
                ),
                Panel(
                    title="Wait for the budget",
                    unit="s",
                    description="How long those that got a turn had waited; at most max_wait.",
                    queries=quantiles("broker_upstream_queue_wait_seconds", 0.5, 0.99),
                ),
                Panel(
                    title="Refused for want of budget",
                    unit="reqps",
                    description="Requests answered 503, because their turn would have come too "
                    "late. Alert: BrokerBudgetExhausted.",
                    queries={"{{instance}}": 'rate(broker_rejections_total{@, limit="budget"}[~])'},
                ),
            ],
        ),
        Row(
            title="Breakers and errors",
            panels=[
                States(
                    title="Breakers",
                    unit="none",
                    description="credentials: the vendor refuses every key of the list; health: "
                    "half of ten or more calls in 30 s failed. While one is open no call is made. "
                    "Alerts: BrokerCredentialBreakerOpen, BrokerHealthBreakerOpen.",
                    queries={"{{instance}} {{breaker}}": "broker_breaker_open{@}"},
                    words={"0": ("closed", "green"), "1": ("open", "red")},
                ),
                Panel(
                    title="Calls by status",
                    unit="reqps",
                    description="What the vendor answered to mints; none: it did not. Validate: "
                    "whether it answered what was asked while mints hang.",
                    queries={
                        "{{status}}": "sum by (status) "
                        "(rate(broker_upstream_requests_total{@}[~]))",
                        "validate {{outcome}}": "sum by (outcome) "
                        "(rate(broker_upstream_validations_total{@}[~]))",
                    },
                    stacked=True,
                    colours={"200": "green", "none": "dark-red"},
                ),
                Panel(
                    title="Calls that gave no token",
                    unit="reqps",
                    description="By what went wrong; one call of a mint that then succeeded at the "
                    "second try counts, too.",
                    queries={
                        "{{reason}}": "sum by (reason) (rate(broker_upstream_errors_total{@}[~]))"
                    },
                    stacked=True,
                ),
            ],
        ),
        Row(
            title="Mints",
            across=4,
            panels=[
                Panel(
                    title="Mint latency",
                    unit="s",
                    description="What the issuer took for one token, without the wait for the "
                    "budget, whatever came of it.",
                    queries=quantiles("broker_mint_duration_seconds", 0.5, 0.9, 0.99),
                ),
                Heat(
                    title="Mint latency, all of it",
                    unit="s",
                    description="Mints by how long they took.",
                    queries={
                        "{{le}}": "sum by (le) (rate(broker_mint_duration_seconds_bucket{@}[~]))"
                    },
                ),
                Panel(
                    title="Mints by outcome",
                    unit="ops",
                    description="refused: the vendor's verdict on agent, model or account; failed: "
                    "no usable answer.",
                    queries={
                        "{{outcome}}": "sum by (outcome) "
                        "(rate(broker_mint_duration_seconds_count{@}[~]))"
                    },
                    stacked=True,
                    colours=MINTS,
                ),
                Panel(
                    title="Mints in flight",
                    unit="short",
                    description="Under way or waiting for the budget.",
                    queries={"{{instance}}": "broker_mints_in_flight{@}"},
                ),
            ],
        ),
        Row(
            title="Latency objective",
            across=2,
            panels=[
                Panel(
                    title="Burn rate",
                    unit="short",
                    description="Slow mints (above 2.5 s) over the 1 % that may be: at 1 the "
                    "allowance of 30 days lasts 30 days, at 14.4 two. Alert: BrokerMintsSlow.",
                    queries={
                        name: "(1 - sum(rate(broker_mint_duration_seconds_bucket"
                        f'{{@, le="2.5"}}[{name}])) '
                        f"/ sum(rate(broker_mint_duration_seconds_count{{@}}[{name}]))) / 0.01"
                        for name in ("5m", "1h")
                    },
                    alarm=14.4,
                ),
                Panel(
                    title="Burn rate, slowly",
                    unit="short",
                    description="The same over longer windows: at 6 the allowance is gone in five "
                    "days. Alert: BrokerMintsSlowly.",
                    queries={
                        name: "(1 - sum(rate(broker_mint_duration_seconds_bucket"
                        f'{{@, le="2.5"}}[{name}])) '
                        f"/ sum(rate(broker_mint_duration_seconds_count{{@}}[{name}]))) / 0.01"
                        for name in ("30m", "6h")
                    },
                    alarm=6,
                ),
            ],
        ),
        Row(
            title="Renewals",
            across=2,
            panels=[
                Panel(
                    title="Renewals by reason and outcome",
                    unit="ops",
                    description="Mints for a key that held a token. ahead: in the background; "
                    "floor: too little life left; fresh: asked for. same: no newer one.",
                    queries={
                        "{{reason}} {{outcome}}": "sum by (reason, outcome) "
                        "(rate(broker_refreshes_total{@}[~]))"
                    },
                    stacked=True,
                ),
                Panel(
                    title="Renewals that failed",
                    unit="percentunit",
                    description="Share of the renewals that brought no newer token; visitors keep "
                    "the held one as long as it is good.",
                    queries={
                        "{{reason}}": "sum by (reason) "
                        '(rate(broker_refreshes_total{@, outcome!="renewed"}[~])) '
                        "/ sum by (reason) (rate(broker_refreshes_total{@}[~]))"
                    },
                ),
            ],
        ),
        Row(
            title="Other routes, passed on",
            panels=[
                Panel(
                    title="Passed on by outcome",
                    unit="reqps",
                    description="Requests for other routes of the vendor, by the class of its "
                    "status; refused by the broker; failed: no answer; broken in the middle; "
                    "left by the caller. Only with pass_through.",
                    queries={
                        "{{outcome}}": "sum by (outcome) "
                        "(rate(broker_pass_through_requests_total{@}[~]))"
                    },
                    stacked=True,
                    colours={"2xx": "green", "failed": "dark-red", "broken": "red"},
                ),
                Panel(
                    title="Time to pass on",
                    unit="s",
                    description="From the head of the request to the end of the answer.",
                    queries=quantiles("broker_pass_through_duration_seconds", 0.5, 0.99),
                ),
                Panel(
                    title="Passed on at a time",
                    unit="short",
                    description="Requests under way, by instance; of the 128 places of each "
                    "process a client may take as many as it leaves free; others get 503.",
                    queries={"{{instance}}": "broker_pass_through_in_flight{@}"},
                ),
            ],
        ),
    ],
)
