/* CopyFile: files that come in pieces, whole or absent. */
#ifndef AGENT_COPYFILE_H
#define AGENT_COPYFILE_H

#include "ttrpc.h"

extern const struct ttrpc_method_row copyfile_calls[];

#endif
