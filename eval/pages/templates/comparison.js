// Hides the plot marks of rows that are filtered out.

startTables({shows: () => {
  const gone = new Set(all("tr[data-number][hidden]").map(row => row.dataset.number));
  for (const mark of all('svg [id^="point-"], svg [id^="interval-"], svg [id^="name-"]'))
    mark.style.display = gone.has(mark.id.split("-").pop()) ? "none" : "";
}});
