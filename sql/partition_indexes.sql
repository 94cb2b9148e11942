-- The statements that make the parts of outbox_xid_idx that are missing, for psql's \gexec: to be run one by
-- one, in this order, and not in a transaction.
SELECT made.statement
FROM pg_inherits AS i
JOIN pg_class AS c ON c.oid = i.inhrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace,
    format('%I.%I', n.nspname, left(c.relname, 55) || '_xid_idx') AS name,
    LATERAL (VALUES
        -- Left by one that was cut short.
        (1, format('DROP INDEX CONCURRENTLY IF EXISTS %s', name)),
        (2, format('CREATE INDEX CONCURRENTLY %I ON %s (xid)', left(c.relname, 55) || '_xid_idx', c.oid::regclass)),
        (3, format('ALTER INDEX %I.outbox_xid_idx ATTACH PARTITION %s', :'schema', name))
    ) AS made (number, statement)
WHERE i.inhparent = to_regclass(quote_ident(:'schema') || '.outbox')
    AND NOT EXISTS (
        SELECT FROM pg_index AS x
        JOIN pg_inherits AS part ON part.inhrelid = x.indexrelid
        WHERE x.indrelid = c.oid AND part.inhparent = to_regclass(quote_ident(:'schema') || '.outbox_xid_idx')
    )
    AND (made.number > 1 OR to_regclass(name) IS NOT NULL)
ORDER BY c.oid, made.number
