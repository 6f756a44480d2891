"""Prometheus and Alertmanager with what config/prometheus/ ships, and what they can be asked."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plain
from prometheus_client.parser import text_string_to_metric_families
from running import daemon, free_port

SHIPPED = Path(__file__).parents[2] / "config" / "prometheus"


class Prometheus:
    """The query interface of a Prometheus server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def values(self, query: str, at: float | None = None) -> list[float]:
        """Return the finite values of an instant query, now or at a Unix time."""
        when = {} if at is None else {"time": str(at)}
        result = self._get("/api/v1/query", query=query, **when)["result"]
        return [v for sample in result if math.isfinite(v := float(sample["value"][1]))]

    def curves(
        self, query: str, begins: float, ends: float, step: float = 1.0
    ) -> dict[str, list[tuple[float, float]]]:
        """Return the finite points (Unix time, value) of each series, by its labels."""
        asked = {"query": query, "start": str(begins), "end": str(ends), "step": str(step)}
        curves = {}
        for series in self._get("/api/v1/query_range", **asked)["result"]:
            points = [(float(t), float(v)) for t, v in series["values"]]
            name = ", ".join(f"{k}={v}" for k, v in sorted(series["metric"].items()))
            curves[name] = [(t, v) for t, v in points if math.isfinite(v)]
        return {name: points for name, points in curves.items() if points}

    def label_values(self, label: str, selector: str) -> list[str]:
        """Return what Grafana offers for a variable."""
        values: list[str] = self._get(f"/api/v1/label/{label}/values", **{"match[]": selector})
        return values

    def _get(self, path: str, **parameters: str) -> Any:
        answer = plain.get(self._url + path, params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]


@contextmanager
def monitoring(folder: Path, admin_url: str, pager_url: str) -> Iterator[Prometheus]:
    """Run Prometheus and Alertmanager with the shipped files, but for addresses and patience."""
    alerts, address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    alertmanager = _adapted(
        SHIPPED / "alertmanager.yml",
        folder,
        {
            "http://127.0.0.1:9095/": pager_url,
            "group_wait: 30s": "group_wait: 1s",
            "group_interval: 5m": "group_interval: 1s",
        },
    )
    prometheus = _adapted(
        SHIPPED / "prometheus.yml",
        folder,
        {
            "127.0.0.1:9464": admin_url.removeprefix("http://"),
            "127.0.0.1:9093": alerts,
            "scrape_interval: 15s": "scrape_interval: 1s",
            "evaluation_interval: 15s": "evaluation_interval: 1s",
            "- rules.yml": f"- {SHIPPED / 'rules.yml'}",
        },
    )
    paging = ["prometheus-alertmanager", f"--config.file={alertmanager}"]
    paging += [f"--storage.path={folder}/alerts", f"--web.listen-address={alerts}"]
    paging += ["--cluster.listen-address="]  # one of it: no gossip
    scraping = ["prometheus", f"--config.file={prometheus}"]
    scraping += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (
        daemon(paging, folder / "alertmanager.log", f"http://{alerts}/-/ready"),
        daemon(scraping, folder / "prometheus.log", f"http://{address}/-/ready"),
    ):
        yield Prometheus(f"http://{address}")


def _adapted(shipped: Path, folder: Path, changes: Mapping[str, str]) -> Path:
    """Copy a shipped file with these changes, each of which must find its place."""
    text = shipped.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{shipped.name} has no {old!r} any more"
        text = text.replace(old, new)
    path = folder / shipped.name
    path.write_text(text, encoding="utf-8")
    return path


def samples(text: str, name: str) -> dict[str, float]:
    """Return the values of one metric of an exposition by its only label."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }
