"""A page in the browser that shows records: live, while training writes them, or as one file without a server.

    sampled      some hundred rows of a record in memory, which follow the record as it grows
    quantities   what is shown of every unit: formulas of the recorded series
    balances     spectra and matrices of Balances
    described    what there is: runs, their symmetries and settings
    answers      the numbers of each picture, as JSON data
    page         the page's files, as a server sends them and as one file
    server       an HTTP server on the loopback interface

There is one page and one script for both. The script asks for numbers by questions such as
"series?run=0&symmetry=3&name=charge". On the live page the server answers them; the file has the answers in itself.

Plotly draws: its heat maps, stacked areas and clicks are what the page needs, and its script is one file without a
network. A Bokeh server would have kept the page's logic in Python, but a file without a server would then need that
logic a second time, in JavaScript; Vega has no picture of 500 × 500 cells that answers a click in time. Python's own
http.server serves: the page has a handful of addresses, all read-only.
"""

from noetherperf.view.answers import Answers
from noetherperf.view.page import export
from noetherperf.view.server import PageServer

__all__ = ["Answers", "PageServer", "export"]
