// RobustMutex: a lock in shared memory that no dead process holds.
//
// The kernel releases it when its owner dies; the next one to lock it learns of that, and repairs what it guards before
// it goes on. Should that one die as well, the next begins again: repairs can be repeated.
//
// Thread safety: yes, among all processes that map the memory. A stopped owner (SIGSTOP) is waited for.

#ifndef HPS_STORAGE_ROBUST_MUTEX_H_
#define HPS_STORAGE_ROBUST_MUTEX_H_

#include <pthread.h>

#include <cassert>
#include <cerrno>

namespace hps {

class RobustMutex {
 public:
  // Makes a mutex of zeroed memory that nobody else uses yet.
  void Init() {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&mutex_, &attributes);
    pthread_mutexattr_destroy(&attributes);
  }

 private:
  template <typename Repair>
  friend class RobustLock;

  pthread_mutex_t mutex_;
};

// Holds the mutex while it lives. repair() is called first where the last owner died.
template <typename Repair>
class [[nodiscard]] RobustLock {
 public:
  RobustLock(RobustMutex& mutex, Repair repair) : mutex_(&mutex.mutex_) {
    const int error = pthread_mutex_lock(mutex_);
    if (error == EOWNERDEAD) {
      repair();
      pthread_mutex_consistent(mutex_);
    } else {
      assert(error == 0);
    }
  }
  ~RobustLock() { pthread_mutex_unlock(mutex_); }
  RobustLock(const RobustLock&) = delete;
  RobustLock& operator=(const RobustLock&) = delete;

 private:
  pthread_mutex_t* const mutex_;
};

}  // namespace hps

#endif  // HPS_STORAGE_ROBUST_MUTEX_H_
