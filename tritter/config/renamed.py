"""Keys and groups that have another name since the last version, and are refused with it."""

# Old → new, of a key or of a whole group; a line stays for one version.
RENAMED = {
    "routing": "moe_routing",
    "logger.project": "logger.wandb.project",
    "logger.group": "logger.wandb.group",
    "logger.tags": "logger.wandb.tags",
    "optimizer.beta1": "optimizer.betas",
    "optimizer.beta2": "optimizer.betas",
}


def new_name(key: str) -> str | None:
    """Return what a dotted key is called now, by itself or by the group that it stands in."""
    for old in sorted(RENAMED, key=len, reverse=True):
        if f"{key}.".startswith(f"{old}."):
            return RENAMED[old] + key[len(old) :]
    return None
