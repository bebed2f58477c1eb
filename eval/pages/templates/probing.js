// Sorting and filtering of the tables.

startTables();
