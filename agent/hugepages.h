/* Huge pages, which have to be there before anybody can use them. */
#ifndef AGENT_HUGEPAGES_H
#define AGENT_HUGEPAGES_H

#include "failure.h"
#include "messages.h"

/* Have the kernel set aside as many as the options of a hugetlbfs (pagesize= and size=) say, besides those that
 * there are. */
bool hugepages_allocate(const struct storage *storage, struct failure *failure);

#endif
