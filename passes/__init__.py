"""FX passes, in the order in which a graph goes through them. No folder imports from a later one.

1. `ir`        the words: axis states and edits, cache entries, forms, refusals; the editor of forms, lists of passes;
2. `rules`     one table: for each operator, where its token axis goes and what to edit;
3. `analysis`  tidy a captured graph, and apply the table to all of it, or collect every reason why not;
4. `kernels`   what forms compute beside the model: K-means, the choice of tokens;
5. `writing`   write the full, partial and reuse forms from the analysis;
6. `forms`     passes over a finished form, each of which a plan may ask for or not, and the list of them;
7. `testing`   the oracle that knows the truth about a rule, and a sample call for each rule.

The passes know FX graphs, token grids and counts. They know no model, plan or session.
"""

if __name__ == "passes":
    raise ImportError("import hetcache_compile.passes, not passes: a module imported twice has two rule tables")
