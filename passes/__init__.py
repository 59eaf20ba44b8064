"""FX passes, in processing order.

1. `normalise`         tidy a captured graph: no asserts, no empty concatenations, common subexpressions shared;
2. `axis`              the words of the analysis: axis states, and the edits a partial form needs;
3. `reshape`           where a reshape puts a factor of a dim;
4. `query`, `patches`, `dims`, `attention`, `rules`
                       one table: for each operator, where its token axis goes and what to edit;
5. `inputs`, `pieces`  inputs that hold packed tokens; a token axis that is cut and joined;
6. `analyse`           apply the table to a whole graph, or collect every reason why not;
7. `batch`             the same graph for some samples of a batch;
8. `cache`, `indices`, `forms`
                       write the full, partial and reuse forms from the analysis;
9. passes over a finished form, each of which a plan may ask for or not:
   `layout`            keep all rows of keys and values instead of those of the context,
   `select`            let full steps choose the active tokens (`choose`: which),
   `merge`             attend to centroids of the context (`cluster`: by K-means),
   `predict`, `extrapolate`
                       predict cached keys and values, and outputs (`state`: what such passes share);
10. `buffers`          let a form keep its cache in place.

`graphs` checks what is written; `interleave` tidies forms for exporters; `flops` counts what a form computes; `oracle`
and `samples` know the truth about a rule, and `coverage` is a command that finds missing and wrong ones.

The passes know FX graphs, token grids and counts. They know no model, plan or session.
"""

if __name__ == "passes":
    raise ImportError("import hetcache_compile.passes, not passes: a module imported twice has two rule tables")
