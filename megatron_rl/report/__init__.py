"""report.html: a run on one page. Needs no torch.

report          reads the run's folder and decides what is said; start here
metric_charts   which metric is drawn in which chart
charts, scales  drawing lines as SVG; axes, and fewer points
page, style     the HTML, its stylesheet and script
"""
