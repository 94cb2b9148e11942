-- How wide partitions are from now on. Those that are there stay as they are, and what lies between
-- them and the first of the new width is a narrower one.
--
-- By hand, after partitioned.sql: psql -v schema=postbox -v partitioned=hour -f sql/partition_width.sql
UPDATE :"schema".partitioning AS p
SET width = w.width, ahead = w.ahead
FROM (VALUES ('day', interval '1 day', interval '7 days'), ('hour', '1 hour', '1 day')) AS w (name, width, ahead)
WHERE w.name = :'partitioned' AND w.width <> p.width;
