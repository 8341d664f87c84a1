"""Where lookups were answered, for the tests and for the processes that they start."""

import hierarchical_parameter_server as hps


def looked_up(device=0) -> int:
    """Keys that the caches of model "main" on the device were asked for."""
    total = 0
    for line in hps.prometheus_text().splitlines():
        if line.startswith("hps_cache_keys_asked_total") and f'device="{device}"' in line and 'model="main"' in line:
            total += int(float(line.rsplit(" ", 1)[1]))
    return total
