"""One offline HTML file about a model, from what the other verbs have written. Nothing is measured here.

``sources`` finds their JSON and holds it against the model's file, ``page`` lays it out, ``markup`` writes
elements and charts.
"""
