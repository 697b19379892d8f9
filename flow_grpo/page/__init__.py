"""From run folders to one HTML page that needs nothing else: it opens offline, from a disk, on any device.

words.json  words.py       what the page, `fme check` and `fme train` say of a figure and of a verdict
verdicts.py                what may be said
data.py                    a run's records, history, settings and environment, read back
seeds.py                   runs that differ in their seed alone, and how groups of runs differ
contents.py                what the page is given: JSON for its scripts, tables for its template
build.py                   `build_page`: contents, template, style and scripts in one file
page.html.j2 page.css      the page, empty; what fills it, in the order in which it is put together:
text.js charts.js          helpers; lines and dots as SVG
state.js                   what the reader has chosen, kept in the address
images.js plots.js         grids, dialog and suspects; the charts of a run
page.js                    the rest, and the start
"""
