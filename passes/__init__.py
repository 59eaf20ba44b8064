"""FX passes, in processing order.

1. `normalise`         tidy a captured graph: no asserts, no empty concatenations, common subexpressions shared;
2. `axis`              the words of the analysis: axis states, and the edits a partial form needs;
3. `reshape`           where a reshape puts a factor of a dim;
4. `query`, `patches`, `dims`, `attention`, `rules`
                       one table: for each operator, where its token axis goes and what to edit;
5. `inputs`            inputs that hold packed tokens;
6. `analyse`           apply the table to a whole graph, or collect every reason why not;
7. `indices`, `forms`  write the full, partial and reuse forms from the analysis;
8. `buffers`           let a form keep its cache in place.

`flops` counts what a form computes; `coverage` is a command that finds missing and wrong rules.

The passes know FX graphs, token grids and counts. They know no model, plan or session.
"""

if __name__ == "passes":
    raise ImportError("import hetcache_compile.passes, not passes: a module imported twice has two rule tables")
