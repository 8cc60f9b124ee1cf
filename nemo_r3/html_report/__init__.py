"""`write_report`: a run as one HTML page that needs no server, no network and no script.

run directory -> read.py -> what there is -> rollouts.py (which dialogues), chart.py (curves), health.py -> page.html
"""

from nemo_r3.html_report.page import MOST_BYTES, write_report

__all__ = ["MOST_BYTES", "write_report"]
