"""The founding paper's evidence, made anew: one runner, one config an experiment, results as JSON lines, a report of them.

    python -m experiments.paper --quick        # everything, tiny, to test the pipeline
    python -m experiments.paper                # everything, on the embedded model
    python -m experiments.paper --report       # tables, figures and experiments/REPORT.md from what is stored

"The Labyrinth and the Thread" (arXiv 2605.26670) is what is meant by the paper.
"""
