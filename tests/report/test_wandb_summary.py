"""What stands beside a run in W&B's tables."""

from tritter.pipeline.metrics import wandb_summary


def test_the_verdict_of_each_domain_is_there(summary_with_control):
    told = wandb_summary(summary_with_control)
    last = summary_with_control["attempts"][-1]
    assert told["status"] == summary_with_control["status"]
    assert told["flops"] == summary_with_control["flops"]["total"]
    for domain, record in last["final"].items():
        assert told[f"{domain}/trained"] == record["loss"]
        assert told[f"control/{domain}/trained"] != record["loss"]
    verdicts = {c["subject"]: c["verdict"] for c in last["gate"] if c["check"] == "retention"}
    assert all(told[f"{domain}/verdict"] == verdict for domain, verdict in verdicts.items())
    assert None not in told.values()
