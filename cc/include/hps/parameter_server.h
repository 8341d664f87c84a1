// ParameterServer: the composition root. Opens the stores that a configuration names, loads the models into them and
// hands out lookup sessions.
//
// Thread safety: all methods may be called from any thread. Loading, replacing and unloading are done one at a time and
// do not stop lookups. Ownership: sessions keep what they need alive; Close (or the last reference) stops the server.

#ifndef HPS_PARAMETER_SERVER_H_
#define HPS_PARAMETER_SERVER_H_

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hps/config.h"
#include "hps/lookup_session.h"
#include "hps/status.h"

namespace hps {

struct DeviceSource;

struct ServerOptions {
  bool show_progress = true;                     // log lines while tables load
  const std::atomic<bool>* cancelled = nullptr;  // looked at by Open alone: true ends it soon, with kCancelled
  // Puts an adaptor around a store before it is used (to meter it, to let it fail in a test); `tier` is "volatile" or
  // "persistent". Must not return nullptr.
  std::function<std::shared_ptr<TableStore>(std::string_view tier, std::shared_ptr<TableStore> store)> adapt_store = {};
  // False: no caches on devices, whatever the models' gpucache says; lookups are served by the tiers.
  bool device_caches = true;
  std::shared_ptr<const DeviceSource> devices = nullptr;  // of tests (cc/core/devices.h); absent: this process's GPUs
};

// For load balancers and people.
struct Readiness {
  bool ready = false;
  std::string reason;  // one sentence: why not, or what works with restrictions; "ready" otherwise
  struct TierState {
    std::string tier;     // "volatile" or "persistent"
    std::string store;    // its kind
    bool needed = false;  // lookups fail without it
    bool reachable = false;
    std::string error = {};  // empty where it is reachable
  };
  std::vector<TierState> tiers = {};
  std::vector<std::string> models = {};  // loaded ones
};

class ParameterServer {
 public:
  // Opens the stores, then loads every model of the configuration. Errors name the model, table and file.
  static Result<std::shared_ptr<ParameterServer>> Open(const ServerConfig& config, const ServerOptions& options = {});
  // The same from a ps.json file.
  static Result<std::shared_ptr<ParameterServer>> Open(const std::string& config_path,
                                                       const ServerOptions& options = {});
  ~ParameterServer();
  ParameterServer(const ParameterServer&) = delete;
  ParameterServer& operator=(const ParameterServer&) = delete;

  // kNotFound lists the models there are.
  Result<LookupSession> NewSession(std::string_view model) const;

  // kAlreadyExists if a model of that name is loaded; kResourceExhausted if it would not fit in memory, the host's or
  // that of a device; kInvalidArgument if it wants a cache on a device that is not there while others are. Once
  // *cancelled, if given, is true the load ends soon with kCancelled and leaves nothing behind; so with ReplaceModel.
  Status LoadModel(const ModelConfig& model, const std::atomic<bool>* cancelled = nullptr);
  // Stages the new version beside the old, then switches all its tables at once. On error the old version serves on.
  // Both versions need room meanwhile, also on devices.
  // Callers know tables by number and width, so the new version has the old one's tables in the same places
  // (kInvalidArgument), and may have more after them.
  Status ReplaceModel(const ModelConfig& model, const std::atomic<bool>* cancelled = nullptr);
  // Frees the model's memory once lookups that run have ended. Rows in a persistent store stay there. Sessions of the
  // model do not come back to life when one of that name is loaded again.
  Status UnloadModel(std::string_view model);
  std::vector<std::string> ModelNames() const;

  // Inserts or overwrites rows of a loaded model in all its tiers, then brings them to the caches of its devices. When
  // the call has returned, no lookup that begins later gives an older row. A static cache takes new rows of its keys,
  // but no new keys: those are there for the host's lookups only, until the model is replaced. Where a new version of
  // the model is being loaded, the keys are looked at again before it takes over: it serves what its lowest tier then
  // holds.
  // kNotFound, kInvalidArgument, kOutOfRange (a key beyond 32 bits where supportlonglong is false),
  // kFailedPrecondition (a database that is read-only), and what tiers and devices report; then some tiers may have
  // the rows and others not: repeat the call. A device that has failed is passed over.
  Status UpdateRows(std::string_view model, uint32_t table, std::span<const Key> keys, ConstRowBuffer rows);
  // The same for keys that are to be gone. Where cache_missed_embeddings is on, a row that a lookup is just moving up
  // may come back into the volatile tier.
  Status EraseRows(std::string_view model, uint32_t table, std::span<const Key> keys);
  // Reads every row that the model's caches hold anew from its tiers, on one device or on all: what other processes
  // wrote there comes into the caches. Keys that no tier holds are taken out. kInvalidArgument: the model has no cache
  // on that device; kFailedPrecondition: its caches are static.
  Status RefreshCaches(std::string_view model, std::optional<int> device = std::nullopt,
                       const std::atomic<bool>* cancelled = nullptr);

  // Ready: the server is open, every model of its configuration is loaded (unless it was unloaded on purpose), no
  // device with caches has failed, and each tier without which lookups fail answered just now. Asks each tier for one
  // row and waits at most a second for it; while a tier is known not to answer it is asked as rarely as lookups ask it,
  // so that recovery is noticed here too.
  Readiness CheckReadiness() const;

  // A JSON object: configuration hash, models, tables, rows per tier, memory, load reports, counters, latencies.
  std::string StatsJson() const;
  // The metrics in Prometheus' text format; of several servers, with the label `server`, their configuration hash.
  std::string PrometheusText() const;
  static std::string PrometheusText(std::span<const std::shared_ptr<ParameterServer>> servers);

  const ServerConfig& config() const;
  // Idempotent. Lookups that run may fail, later ones do, with kFailedPrecondition, and so does a load that runs.
  Status Close();
  // Closes every open server of this process. Runs by itself when the process exits.
  static Status CloseAll();
  bool closed() const;

 private:
  class Impl;
  explicit ParameterServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace hps

#endif  // HPS_PARAMETER_SERVER_H_
