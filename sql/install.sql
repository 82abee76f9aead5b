-- the extension installs, and stands where the documentation says
CREATE EXTENSION chat;
SELECT extname, nspname AS schema, extrelocatable
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
WHERE extname = 'chat';
-- nothing is granted to everybody
SELECT p.oid::regprocedure AS function_for_all
FROM pg_proc p
WHERE p.pronamespace = 'chat'::regnamespace
  AND has_function_privilege('public', p.oid, 'EXECUTE')
ORDER BY 1;
SELECT c.oid::regclass AS relation_for_all
FROM pg_class c, aclexplode(c.relacl) a
WHERE c.relnamespace = 'chat'::regnamespace AND a.grantee = 0
ORDER BY 1;
SELECT has_schema_privilege('public', 'chat', 'USAGE') AS schema_for_all;
-- every function says what it is for
SELECT p.oid::regprocedure AS without_comment
FROM pg_proc p
WHERE p.pronamespace = 'chat'::regnamespace
  AND obj_description(p.oid, 'pg_proc') IS NULL
ORDER BY 1;
