// Where passwords and certificates come from. Messages never carry a password.

#ifndef HPS_STORAGE_REDIS_SECRETS_H_
#define HPS_STORAGE_REDIS_SECRETS_H_

#include "cc/storage/redis_connection.h"
#include "cc/storage/redis_store.h"

namespace hps {

// kInvalidArgument: more than one source of the password. kNotFound: the variable, or a file, does not exist.
// kFailedPrecondition: it is empty, or cannot be read, or is no certificate.
Result<RedisLogin> LoadRedisLogin(const RedisStoreOptions& options);

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_SECRETS_H_
