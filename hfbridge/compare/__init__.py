"""The same job on the HF Trainer, on a loop written with accelerate, and on Lightning.

job.py          what is trained
engines.py      by whom, by name
record.py       what is recorded of each optimizer step; digests.py
training.py     each engine, recorded; loop.py is the accelerate one
worker.py       one rank of it, in a process of its own; processes.py starts and ends them
verdict.py      whether two engines did the same; causes.py names why not
report/         the page that shows it
comparison.py   compare, from a script to the verdicts; files.py has the table of the files
earlier.py      what is in the folder already
progress_lines.py  progress while training; outcome.py the result
"""

from hfbridge.compare.comparison import compare
from hfbridge.compare.engines import ENGINES
from hfbridge.compare.job import Job
from hfbridge.compare.outcome import Comparison
from hfbridge.compare.verdict import Verdict

__all__ = ["ENGINES", "Comparison", "Job", "Verdict", "compare"]
