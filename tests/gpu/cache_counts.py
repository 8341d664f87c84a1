"""Where lookups were answered, for the tests and for the processes that they start."""

import hierarchical_parameter_server as hps

ASKED = ("hps_cache_rows_served_total", "hps_cache_rows_missed_total", "hps_cache_rows_unwaited_total")


def looked_up(device=0) -> int:
    """Keys that the caches of model "main" on the device were asked for; what a call misses counts once in it."""
    total = 0
    for line in hps.prometheus_text().splitlines():
        if line.startswith(ASKED) and f'device="{device}"' in line and 'model="main"' in line:
            total += int(float(line.rsplit(" ", 1)[1]))
    return total
