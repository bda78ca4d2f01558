"""8-bit integers: ranges, the graph, what each layer costs, the search for what stays float."""
